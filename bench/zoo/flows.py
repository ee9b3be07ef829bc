"""Normalising flows as decoders, quantisers, mixtures."""

from __future__ import annotations

import torch
from torch import nn

from bench.zoo.entry import Direct, Lifted, M, entry


def sampled(flows: list[nn.Module]) -> nn.Module:
    """A flow of normflows in the direction of samples."""

    def run(flows, z):
        for flow in flows:
            z = flow(z)[0]
        return z

    return Direct(nn.ModuleList(flows), run)


@entry("normflows")
def real_nvp() -> nn.Module:
    from normflows import flows, nets

    mask = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)
    net = lambda: nets.MLP([M, 6, M])  # noqa: E731
    masks = (mask, 1 - mask)
    return sampled([flows.MaskedAffineFlow(b, net(), net()) for b in masks])


@entry("normflows")
def affine_coupling() -> nn.Module:
    from normflows import flows, nets

    parts = []
    for _ in range(2):
        parts += [flows.AffineCouplingBlock(nets.MLP([2, 6, 4])), flows.Permute(M, mode="swap")]
    return sampled(parts)


@entry("normflows")
def planar() -> nn.Module:
    from normflows import flows

    return sampled([flows.Planar((M,)), flows.Planar((M,)), flows.Radial((M,))])


@entry("normflows")
def lu_permutation_act_norm() -> nn.Module:
    from normflows import flows

    norm = flows.ActNorm((M,))
    norm.data_dep_init_done.fill_(1.0)
    return sampled([flows.LULinearPermute(M), norm])


@entry("normflows")
def spline_coupling() -> nn.Module:
    from normflows import flows

    return sampled([flows.CoupledRationalQuadraticSpline(M, 1, 8)])


@entry("normflows")
def autoregressive_splines() -> nn.Module:
    from normflows import flows

    return sampled([flows.AutoregressiveRationalQuadraticSpline(M, 1, 8)])


@entry("normflows")
def glow_block() -> nn.Module:
    from normflows import flows

    block = flows.GlowBlock(4, 8, init_zeros=False)
    for part in block.flows:
        if hasattr(part, "data_dep_init_done"):
            part.data_dep_init_done.fill_(1.0)
    return Lifted(block, 4, 2, 2, call=lambda net, h: net(h)[0])


@entry("nflows")
def affine_couplings() -> nn.Module:
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import AffineCouplingTransform

    net = AffineCouplingTransform(torch.tensor([1, -1, 1, -1]), lambda i, o: ResidualNet(i, o, 6))
    return Direct(net, lambda net, z: net.inverse(z)[0])


@entry("nflows")
def masked_autoregression() -> nn.Module:
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    net = MaskedAffineAutoregressiveTransform(M, 6, num_blocks=1)
    return Direct(net, lambda net, z: net.inverse(z)[0])


@entry("nflows")
def spline_couplings() -> nn.Module:
    """Splines that compute only the entries inside of their interval."""
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform

    make = lambda i, o: ResidualNet(i, o, 6)  # noqa: E731
    mask = torch.tensor([1, -1, 1, -1])
    net = PiecewiseRationalQuadraticCouplingTransform(mask, make, tails="linear")
    return Direct(net, lambda net, z: net(z)[0])


@entry("nflows")
def permuted_lu() -> nn.Module:
    from nflows.transforms import CompositeTransform, LULinear, ReversePermutation

    net = CompositeTransform([LULinear(M), ReversePermutation(M), LULinear(M)])
    return Direct(net, lambda net, z: net.inverse(z)[0])


def zuko_flow(kind: str, **options) -> nn.Module:
    import zuko

    net = getattr(zuko.flows, kind)(M, transforms=2, hidden_features=(6,), **options)
    return Direct(net, lambda net, z: net().transform.inv(z))


@entry("zuko")
def masked_flow() -> nn.Module:
    return zuko_flow("MAF")


@entry("zuko")
def coupling_flow() -> nn.Module:
    return zuko_flow("RealNVP")


@entry("zuko")
def spline_flow() -> nn.Module:
    return zuko_flow("NSF")


@entry("zuko")
def bernstein_flow() -> nn.Module:
    """Forward: its inverse is a bisection."""
    import zuko

    net = zuko.flows.BPF(M, transforms=1, hidden_features=(6,), degree=4)
    return Direct(net, lambda net, z: net().transform(z))


@entry("zuko")
def polynomial_flow() -> nn.Module:
    import zuko

    net = zuko.flows.SOSPF(M, transforms=1, hidden_features=(6,))
    return Direct(net, lambda net, z: net().transform(z))


@entry("zuko")
def neural_flow() -> nn.Module:
    import zuko

    net = zuko.flows.NAF(M, transforms=1, hidden_features=(6,))
    return Direct(net, lambda net, z: net().transform(z))


@entry("vector-quantize-pytorch")
def finite_scalars() -> nn.Module:
    from vector_quantize_pytorch import FSQ

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantise, self.out = FSQ([4, 4, 4]), nn.Linear(3, 6)

        def forward(self, h):
            return self.out(self.quantise(h)[0])

    return Lifted(Decoder(), 4, 3)


@entry("vector-quantize-pytorch")
def residual_scalars() -> nn.Module:
    from vector_quantize_pytorch import ResidualFSQ

    net = ResidualFSQ(dim=6, levels=[4, 4, 4], num_quantizers=2)
    return Lifted(net, 3, 6, call=lambda net, h: net(h)[0])
