"""Graph networks, on a constant graph whose nodes' features come from the latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.zoo.entry import Lifted, entry

EDGES = torch.tensor([[0, 1, 2, 3, 0, 2], [1, 2, 3, 0, 2, 0]])


class OnGraph(nn.Module):
    """Layers of torch-geometric over [B, nodes, features] and a constant list of edges."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.register_buffer("edges", EDGES)

    def forward(self, h: Tensor) -> Tensor:
        """[B, 4, features] -> [B, 4, out]."""
        for layer in self.layers:
            h = torch.tanh(layer(h, self.edges))
        return h


def over(*layers: nn.Module, features: int = 6) -> nn.Module:
    return Lifted(OnGraph(*layers), 4, features)


@entry("torch-geometric")
def gcn() -> nn.Module:
    from torch_geometric.nn import GCNConv

    return over(GCNConv(6, 6, node_dim=1), GCNConv(6, 3, node_dim=1))


@entry("torch-geometric")
def sage() -> nn.Module:
    from torch_geometric.nn import SAGEConv

    return over(SAGEConv(6, 6, node_dim=1), SAGEConv(6, 3, aggr="max", node_dim=1))


@entry("torch-geometric")
def gin() -> nn.Module:
    from torch_geometric.nn import GINConv

    return over(GINConv(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), train_eps=True, node_dim=1))


@entry("torch-geometric")
def chebyshev() -> nn.Module:
    from torch_geometric.nn import ChebConv

    return over(ChebConv(6, 4, K=3, node_dim=1))


@entry("torch-geometric")
def graph_convolution() -> nn.Module:
    from torch_geometric.nn import GraphConv

    return over(GraphConv(6, 4, aggr="mean", node_dim=1))


@entry("torch-geometric")
def gated_graph() -> nn.Module:
    from torch_geometric.nn import GatedGraphConv

    def run(net, h):
        return net(h.flatten(0, 1), batched(EDGES, h.shape[0])).view(h.shape[0], 4, -1)

    return Lifted(GatedGraphConv(6, 2), 4, 6, call=run)


def batched(edges: Tensor, count: int) -> Tensor:
    """The list of edges of `count` copies of the graph, as a loader makes it."""
    shift = 4 * torch.arange(count).view(-1, 1, 1)
    return (edges + shift).permute(1, 0, 2).reshape(2, -1)


def batched_layer(layer: nn.Module, features: int = 6) -> nn.Module:
    """All samples' nodes along one axis, as torch-geometric's loaders have them."""

    def run(net, h):
        out = net(h.flatten(0, 1), batched(EDGES, h.shape[0]))
        return torch.tanh(out).view(h.shape[0], 4, -1)

    return Lifted(layer, 4, features, call=run)


@entry("torch-geometric")
def attention() -> nn.Module:
    from torch_geometric.nn import GATConv

    return batched_layer(GATConv(6, 3, heads=2))


@entry("torch-geometric")
def attention_v2() -> nn.Module:
    from torch_geometric.nn import GATv2Conv

    return batched_layer(GATv2Conv(6, 3, heads=2))


@entry("torch-geometric")
def graph_transformer() -> nn.Module:
    from torch_geometric.nn import TransformerConv

    return batched_layer(TransformerConv(6, 3, heads=2))


@entry("torch-geometric")
def edge_convolution() -> nn.Module:
    from torch_geometric.nn import EdgeConv

    return batched_layer(EdgeConv(nn.Sequential(nn.Linear(12, 6), nn.ReLU()), aggr="max"))


@entry("torch-geometric")
def inner_products() -> nn.Module:
    from torch_geometric.nn import InnerProductDecoder

    def run(net, h):
        return net(h.flatten(0, 1), batched(EDGES, h.shape[0])).view(h.shape[0], -1)

    return Lifted(InnerProductDecoder(), 4, 6, call=run)


@entry("torch-geometric")
def dense_convolution() -> nn.Module:
    from torch_geometric.nn import DenseGCNConv

    adjacency = (torch.rand(4, 4) > 0.5).double()
    return Lifted(DenseGCNConv(6, 4), 4, 6, call=lambda net, h: net(h, adjacency))


@entry("torch-geometric")
def set_transformer() -> nn.Module:
    from torch_geometric.nn.aggr import SetTransformerAggregation

    def run(net, h):
        index = torch.arange(h.shape[0]).repeat_interleave(4)
        return net(h.flatten(0, 1), index, dim_size=h.shape[0], max_num_elements=4)

    return Lifted(SetTransformerAggregation(6, 2, heads=2, concat=True), 4, 6, call=run)


@entry("egnn-pytorch")
def equivariant_layer() -> nn.Module:
    from egnn_pytorch import EGNN

    def run(net, h):
        features, places = net(h[..., :4], h[..., 4:])
        return torch.cat([features, places], -1)

    return Lifted(EGNN(dim=4), 3, 7, call=run)


@entry("egnn-pytorch")
def equivariant_neighbours() -> nn.Module:
    """Only the nearest two neighbours send messages."""
    from egnn_pytorch import EGNN

    def run(net, h):
        features, places = net(h[..., :4], h[..., 4:])
        return torch.cat([features, places], -1)

    return Lifted(EGNN(dim=4, num_nearest_neighbors=2), 4, 7, call=run)


@entry("e3nn")
def tensor_product() -> nn.Module:
    from e3nn import o3

    product = o3.FullyConnectedTensorProduct("2x0e+1x1o", "1x0e+1x1o", "3x0e+2x1o")

    def run(net, h):
        return net(h[:, :5], h[:, 5:])

    return Lifted(product, 9, call=run)


@entry("e3nn")
def spherical_harmonics() -> nn.Module:
    from e3nn import o3

    harmonics = o3.SphericalHarmonics([0, 1, 2], normalize=True)
    return Lifted(harmonics, 3)


@entry("e3nn")
def gated_block() -> nn.Module:
    from e3nn import nn as enn
    from e3nn import o3

    gate = enn.Gate("2x0e", [torch.tanh], "1x0e", [torch.sigmoid], "1x1o")
    return Lifted(nn.Sequential(o3.Linear("3x0e+2x1o", gate.irreps_in), gate), 9)
