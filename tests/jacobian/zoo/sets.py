"""Decoders of graphs, molecules, meshes, point clouds and poses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.jacobian.zoo.pattern import M, Parts, lifted, pattern, weights

EDGES = torch.tensor([[0, 1, 2, 3, 0, 2], [1, 2, 3, 0, 2, 0]])


@pattern()
def inner_products():
    """The adjacency of a graph from products of its nodes' latents."""

    def run(h):
        adjacency = torch.sigmoid(h @ h.transpose(1, 2))
        return adjacency * (1 - torch.eye(adjacency.shape[-1], dtype=h.dtype))

    return lifted(run, 4, 3)


@pattern()
def graph_convolution():
    """Messages along a constant list of edges, divided by the degree."""

    def run(own, h):
        source, target = own.edges
        degree = torch.zeros(4, dtype=h.dtype).index_add(
            0, target, torch.ones_like(target, dtype=h.dtype)
        )
        norm = degree.clamp(min=1).rsqrt()
        messages = own.linear(h)[:, source] * (norm[source] * norm[target]).unsqueeze(-1)
        return torch.zeros_like(messages[:, :4]).index_add(1, target, messages)

    return lifted(run, 4, 3, edges=EDGES, linear=nn.Linear(3, 3))


@pattern()
def batched_graph():
    """All samples' nodes along one axis, as loaders of graphs have them."""

    def run(own, h):
        shift = 4 * torch.arange(h.shape[0]).view(-1, 1, 1)
        source, target = (own.edges + shift).permute(1, 0, 2).reshape(2, -1)
        nodes = own.linear(h.flatten(0, 1))
        out = torch.zeros_like(nodes).index_add(0, target, nodes[source])
        return out.view(h.shape[0], 4, 3)

    return lifted(run, 4, 3, edges=EDGES, linear=nn.Linear(3, 3))


@pattern()
def edge_attention():
    """A softmax over the edges of each node, by scatter_reduce and scatter_add (GAT)."""

    def run(own, h):
        source, target = own.edges
        h = own.linear(h)
        score = F.leaky_relu(h[:, source] @ own.a + h[:, target] @ own.b, 0.2)
        index = target.expand(score.shape[0], -1)
        top = torch.full_like(score[:, :4], -1e9).scatter_reduce(1, index, score.detach(), "amax")
        weight = torch.exp(score - top[:, target])
        total = torch.zeros_like(score[:, :4]).scatter_add(1, index, weight)
        messages = (weight / (total[:, target] + 1e-16)).unsqueeze(-1) * h[:, source]
        out = torch.zeros_like(h)
        return out.scatter_add(1, index.unsqueeze(-1).expand_as(messages), messages)

    return lifted(run, 4, 3, edges=EDGES, linear=nn.Linear(3, 3), a=weights(3), b=weights(3))


@pattern()
def dense_graph_attention():
    """A constant adjacency as a mask."""

    def run(own, h):
        h = own.linear(h)
        score = F.leaky_relu((h @ own.a).unsqueeze(2) + (h @ own.b).unsqueeze(1), 0.2)
        score = torch.where(own.adjacency > 0, score, -9e15 * torch.ones_like(score))
        return F.elu(F.softmax(score, -1) @ h)

    adjacency = (torch.rand(4, 4) > 0.4).float() + torch.eye(4)
    parts = dict(linear=nn.Linear(3, 3), a=weights(3), b=weights(3))
    return lifted(run, 4, 3, adjacency=adjacency, **parts)


@pattern(refused="_sparse_mm has no tangent rule")
def sparse_graph():
    """A constant sparse matrix times the nodes' features."""

    def run(own, h):
        flat = h.permute(1, 0, 2).reshape(4, -1)
        return torch.sparse.mm(own.adjacency, flat).view(4, -1, 3).permute(1, 0, 2)

    adjacency = torch.sparse_coo_tensor(EDGES, torch.rand(6), (4, 4)).coalesce()
    return lifted(run, 4, 3, adjacency=adjacency)


@pattern()
def equivariant_graph():
    """Coordinates moved along distances of all pairs (EGNN)."""

    def run(own, h):
        features, x = h.split([3, 3], -1)
        offset = x.unsqueeze(2) - x.unsqueeze(1)
        distance = offset.pow(2).sum(-1, keepdim=True)
        pairs = [
            features.unsqueeze(2).expand(-1, -1, 4, -1),
            features.unsqueeze(1).expand(-1, 4, -1, -1),
        ]
        message = F.silu(own.edge(torch.cat([*pairs, distance], -1)))
        x = x + (offset / (distance + 1) * own.coordinate(message)).sum(2) / 3
        return torch.cat([features + own.node(torch.cat([features, message.sum(2)], -1)), x], -1)

    parts = dict(edge=nn.Linear(7, 5), coordinate=nn.Linear(5, 1), node=nn.Linear(8, 3))
    return lifted(run, 4, 6, **parts)


@pattern()
def molecule():
    """Atoms by a softmax that valences mask, symmetric bonds between them."""

    def run(own, h):
        atoms = own.atoms(h).masked_fill(own.forbidden, -1e9).softmax(-1)
        bonds = own.left(h).unsqueeze(2) + own.left(h).unsqueeze(1)
        bonds = own.bonds(F.relu(bonds)).softmax(-1)
        bonds = (bonds + bonds.transpose(1, 2)) / 2
        bonds = bonds * (1 - torch.eye(4, dtype=h.dtype)).unsqueeze(-1)
        return torch.cat([atoms.flatten(1), bonds.flatten(1)], 1)

    parts = dict(atoms=nn.Linear(3, 5), left=nn.Linear(3, 4), bonds=nn.Linear(4, 3))
    return lifted(run, 4, 3, **parts, forbidden=torch.rand(4, 5) < 0.2)


@pattern()
def upper_triangle():
    """A symmetric matrix from the entries of its triangle (GraphVAE)."""

    def run(own, h):
        matrix = torch.zeros(h.shape[0], 4, 4, dtype=h.dtype)
        matrix[:, own.places[0], own.places[1]] = h
        return torch.sigmoid(matrix + matrix.triu(1).transpose(1, 2))

    return lifted(run, 10, places=torch.triu_indices(4, 4))


@pattern()
def folding():
    """FoldingNet: a constant grid, folded twice by the latents."""

    def run(own, z):
        grid = own.grid.unsqueeze(0).expand(z.shape[0], -1, -1)
        code = z.unsqueeze(1).expand(-1, grid.shape[1], -1)
        points = own.first(torch.cat([code, grid], -1))
        return own.second(torch.cat([code, points], -1))

    grid = torch.cartesian_prod(torch.linspace(-1, 1, 3), torch.linspace(-1, 1, 3))
    first = nn.Sequential(nn.Linear(M + 2, 6), nn.ReLU(), nn.Linear(6, 3))
    second = nn.Sequential(nn.Linear(M + 3, 6), nn.ReLU(), nn.Linear(6, 3))
    return Parts(run, grid=grid, first=first, second=second)


@pattern()
def point_net():
    """Shared layers along points and a maximum over them."""

    def run(own, h):
        local = F.relu(own.local(h))
        overall = torch.max(local, 2, keepdim=True)[0].expand_as(local)
        return own.out(torch.cat([local, overall], 1))

    return lifted(run, 3, 5, local=nn.Conv1d(3, 4, 1), out=nn.Conv1d(8, 3, 1))


@pattern()
def nearest_neighbours():
    """Differences to the two nearest points (DGCNN)."""

    def run(own, h):
        inner = -2 * torch.matmul(h, h.transpose(2, 1))
        square = torch.sum(h**2, dim=2, keepdim=True)
        index = (-square - inner - square.transpose(2, 1)).topk(k=3, dim=-1)[1][..., 1:]
        rows = torch.arange(h.shape[0]).view(-1, 1, 1)
        edges = h[rows, index] - h.unsqueeze(2)
        return own.mlp(torch.cat([edges, h.unsqueeze(2).expand_as(edges)], -1)).max(2)[0]

    return lifted(run, 5, 3, mlp=nn.Linear(6, 4))


@pattern()
def mesh():
    """Spiral convolutions and sampling matrices on a template (CoMA, Neural3DMM)."""

    def run(own, h):
        coarse = own.up @ h
        spiral = coarse[:, own.spirals.view(-1)].view(-1, 6, 3 * 3)
        return own.template + own.conv(F.elu(spiral))

    up = torch.rand(6, 3).softmax(1)
    spirals = torch.stack([torch.randperm(6)[:3] for _ in range(6)])
    return lifted(
        run, 3, 3, up=up, spirals=spirals, template=torch.randn(6, 3), conv=nn.Linear(9, 3)
    )


@pattern()
def deep_set():
    def run(own, h):
        pooled = F.relu(own.phi(h)).mean(1, keepdim=True)
        return own.rho(h - own.down(pooled) + torch.logsumexp(h, 1, keepdim=True))

    return lifted(run, 4, 3, phi=nn.Linear(3, 5), down=nn.Linear(5, 3), rho=nn.Linear(3, 2))


@pattern()
def sinkhorn():
    """A doubly stochastic matrix by repeated normalisation of logarithms."""

    def run(h):
        for _ in range(5):
            h = h - torch.logsumexp(h, 2, keepdim=True)
            h = h - torch.logsumexp(h, 1, keepdim=True)
        return h.exp()

    return lifted(run, 3, 3)


@pattern()
def six_dimensional_rotation():
    """Rotations by Gram-Schmidt (Zhou et al. 2019)."""

    def run(h):
        a, b = h[..., :3], h[..., 3:]
        x = F.normalize(a, dim=-1)
        y = F.normalize(b - (x * b).sum(-1, keepdim=True) * x, dim=-1)
        return torch.stack((x, y, torch.cross(x, y, dim=-1)), dim=-2)

    return lifted(run, 2, 6)


@pattern()
def skeleton():
    """Forward kinematics: quaternions to matrices, a product along the parents."""

    def run(own, h):
        w, x, y, z = F.normalize(h, dim=-1).unbind(-1)
        entries = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]
        entries += [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]
        entries += [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
        turn = torch.stack(entries, -1).unflatten(-1, (3, 3))
        turns, places = [turn[:, 0]], [torch.zeros_like(h[:, 0, :3])]
        for joint, parent in enumerate((0, 0, 2), 1):
            turns.append(turns[parent] @ turn[:, joint])
            places.append(places[parent] + turns[parent] @ own.bones[joint])
        return torch.stack(places, 1)

    return lifted(run, 4, 4, bones=torch.randn(4, 3))


@pattern()
def skinning():
    """Linear blend skinning: axis-angle by Rodrigues, homogeneous matrices, weights."""

    def run(own, h):
        angle = (h + 1e-8).norm(dim=-1, keepdim=True)
        x, y, z = (h / angle).unbind(-1)
        zero = torch.zeros_like(x)
        K = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).view(-1, 2, 3, 3)
        sine, cosine = torch.sin(angle).unsqueeze(-1), torch.cos(angle).unsqueeze(-1)
        turn = torch.eye(3, dtype=h.dtype) + sine * K + (1 - cosine) * torch.matmul(K, K)
        placed = torch.cat([turn, own.joints.expand(h.shape[0], -1, -1).unsqueeze(-1)], -1)
        blended = torch.einsum("vj,bjkl->bvkl", own.weights.softmax(-1), placed)
        return (blended @ own.vertices.unsqueeze(-1)).squeeze(-1)

    vertices = torch.cat([torch.randn(5, 3), torch.ones(5, 1)], 1)
    return lifted(run, 2, 3, joints=weights(2, 3), weights=weights(5, 2), vertices=vertices)


@pattern()
def procrustes():
    """The nearest rotation, by a singular value decomposition."""

    def run(h):
        u, _, v = torch.linalg.svd(h.view(-1, 3, 3))
        return u @ v

    return lifted(run, 9)


@pattern()
def atoms_in_radial_basis():
    """Distances smeared by Gaussians with a cosine cutoff (SchNet)."""

    def run(own, h):
        source, target = own.edges
        distance = (h[:, source] - h[:, target]).norm(dim=-1)
        smeared = torch.exp(-own.width * (distance.unsqueeze(-1) - own.centres).pow(2))
        cut = 0.5 * (torch.cos(distance * torch.pi / 5) + 1.0) * (distance < 5.0).to(h.dtype)
        return own.filter(smeared) * cut.unsqueeze(-1)

    parts = dict(edges=EDGES, centres=torch.linspace(0, 5, 4), width=torch.tensor(0.5))
    return lifted(run, 4, 3, **parts, filter=nn.Linear(4, 3))


@pattern()
def matrix_exponential():
    """An orthogonal matrix from a skew one."""

    def run(h):
        return torch.linalg.matrix_exp(h - h.transpose(1, 2))

    return lifted(run, 3, 3)
