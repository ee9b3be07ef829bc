"""isometry_loss: values and gradients against reverse mode in float64."""

import copy

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae.gram import operator, query
from fastsfvae.gram.operator import gram_of
from fastsfvae.gram.tail import Unwritten
from tests._triton import DEVICE, requires_triton
from tests.decoders import M, build
from tests.gram.test_operator import close
from tests.gram.test_pullback import BUILD, TRANSFORMS, of_gradient, refuse
from tests.gram.test_volume import latents, near, results, reverse_mode
from tests.loss.test_compose import Conditional

OVER = ["batch", "sample"]


def measure(J, over):
    """By the singular values of J ``[B, n, m]``."""
    G = J.mT @ J
    trace, square = torch.einsum("bii->b", G), torch.einsum("bij,bji->b", G, G)
    if over == "batch":
        return square.mean() / trace.mean() ** 2
    return (square / trace**2).mean()


def oracle(decoder, z, over, *args, **kwargs):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return measure(reverse_mode(decoder, z, *args, **kwargs), over)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("name", ["higgins", "layer_norm", "tanh", "attention", "frozen", "wide"])
def test_values_and_gradients(name, over, monkeypatch):
    decoder = BUILD[name]()
    z = latents(decoder)
    leaves = [z, *(p for p in decoder.parameters() if p.requires_grad)]
    want = results(oracle(decoder, z, over), leaves)
    monkeypatch.setattr(query, "recomputed", refuse)
    for chunk_size in (None, 1, 2):
        value = sf.isometry_loss(decoder, z, over=over, chunk_size=chunk_size)
        assert value.dim() == 0
        near(results(value, leaves), want)


@pytest.mark.parametrize("over", OVER)
def test_further_inputs(over):
    decoder = Conditional().double()
    z = torch.randn(5, M, dtype=torch.float64, requires_grad=True)
    label, gain = torch.tensor([0, 2, 1, 1, 0]), torch.rand(5, 1, dtype=torch.float64)
    shift = torch.randn(6, dtype=torch.float64)
    leaves = [z, gain.requires_grad_(), shift.requires_grad_(), *decoder.parameters()]
    want = results(oracle(decoder, z, over, label, gain, shift=shift), leaves)
    value = sf.isometry_loss(decoder, z, label, gain, shift=shift, over=over, chunk_size=2)
    near(results(value, leaves), want)


def estimate(decoder, z, probes, over):
    """As it was published: J v by double backward, J^T J v, and their squares, of each probe."""
    traces, squares = [], []
    for v in probes:
        _, Jv = torch.autograd.functional.jvp(decoder, z, v, create_graph=True)
        _, JTJv = torch.autograd.functional.vjp(decoder, z, Jv, create_graph=True)
        traces.append(Jv.flatten(1).square().sum(1))
        squares.append(JTJv.square().sum(1))
    trace, square = torch.stack(traces).mean(0), torch.stack(squares).mean(0)
    if over == "batch":
        return square.mean() / trace.mean() ** 2
    return (square / trace**2).mean()


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("count", [None, 1, 3])
@pytest.mark.parametrize("name", ["higgins", "residual", "tanh", "wide"])
def test_probes(name, count, over):
    decoder = BUILD[name]()
    z = latents(decoder)
    g = torch.Generator().manual_seed(3)
    probes = torch.randn(count or 1, *z.shape, generator=g, dtype=torch.float64)
    probes.requires_grad_()
    leaves = [z, probes, *decoder.parameters()]
    want = results(estimate(decoder, z, probes, over), leaves)
    given = probes if count else probes[0]
    for chunk_size in (None, 2):
        value = sf.isometry_loss(decoder, z, probes=given, over=over, chunk_size=chunk_size)
        near(results(value, leaves), want)


@pytest.mark.parametrize("name", ["layer_norm", "attention", "weight_norm"])
def test_scaled_unit_vectors_are_probes_that_give_the_exact_measure(name):
    # Third derivatives of layer_norm as published code takes them are wrong in PyTorch.
    decoder = build(name)
    z = latents(decoder)
    leaves = [z, *decoder.parameters()]
    probes = M**0.5 * torch.eye(M, dtype=torch.float64).unsqueeze(1).expand(M, 5, M)
    want = results(oracle(decoder, z, "batch"), leaves)
    near(results(sf.isometry_loss(decoder, z, probes=probes), leaves), want)


def test_many_probes_come_to_the_exact_measure():
    decoder = build("tanh")
    z = latents(decoder).detach()
    g = torch.Generator().manual_seed(3)
    probes = torch.randn(4000, *z.shape, generator=g, dtype=torch.float64)
    found = sf.isometry_loss(decoder, z, probes=probes)
    assert found.item() == pytest.approx(sf.isometry_loss(decoder, z).item(), rel=0.02)


class Conformal(nn.Module):
    """Isometric up to a scale of each sample's own, or of all samples' in common."""

    def __init__(self, common):
        super().__init__()
        columns, _ = torch.linalg.qr(torch.randn(9, M, dtype=torch.float64))
        self.weight, self.common = nn.Parameter(columns), common

    def forward(self, z):
        scale = 3.0 if self.common else z.detach()[:, :1].exp()
        return nn.functional.linear(scale * z, self.weight)


@pytest.mark.parametrize("common", [True, False])
def test_where_it_is_least(common):
    torch.manual_seed(0)
    decoder = Conformal(common)
    z = torch.randn(6, M, dtype=torch.float64, requires_grad=True)
    found = {over: sf.isometry_loss(decoder, z, over=over) for over in OVER}
    assert found["sample"].item() == pytest.approx(1 / M, rel=1e-12)
    assert (found["batch"].item() == pytest.approx(1 / M, rel=1e-12)) == common
    (grad,) = torch.autograd.grad(found["sample"], decoder.weight)
    assert grad.abs().max() < 1e-14
    # Units do not matter.
    with torch.no_grad():
        decoder.weight.mul_(1e20)
    again = sf.isometry_loss(decoder, z, over="batch")
    assert again.item() == pytest.approx(found["batch"].item(), rel=1e-12)


def test_a_ratio_of_large_numbers_in_float32():
    torch.manual_seed(0)
    decoder = nn.Linear(M, 6)
    z = torch.randn(3, M)
    want = sf.isometry_loss(decoder, z, over="sample")
    with torch.no_grad():
        decoder.weight.mul_(1e15)
    value = sf.isometry_loss(decoder, z, over="sample")
    grad = torch.autograd.grad(value, decoder.weight)[0]
    assert value.item() == pytest.approx(want.item(), rel=1e-6) and grad.isfinite().all()


@pytest.mark.parametrize("name", ["tanh", "wide"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_second_order(name, chunk_size):
    decoder = BUILD[name]()
    z = latents(decoder, 3)
    mine = of_gradient(sf.isometry_loss(decoder, z, chunk_size=chunk_size), z, z)
    near([mine], [of_gradient(oracle(decoder, z, "batch"), z, z)])
    (first,) = torch.autograd.grad(
        sf.isometry_loss(decoder, z, over="sample"), z, create_graph=True
    )
    with pytest.raises(RuntimeError, match="have no derivative"):
        torch.autograd.grad(first.square().sum(), z)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms(name, over):
    decoder = build("tanh")
    z = latents(decoder).detach()

    def plain(z):
        G = sf.pullback(decoder, z, backend="reference").gram
        trace, square = torch.einsum("bii->b", G), torch.einsum("bij,bij->b", G, G)
        ratio = square.mean() / trace.mean() ** 2
        return [ratio if over == "batch" else (square / trace**2).mean()] * 2

    def mine(z):
        return [sf.isometry_loss(decoder, z, over=over, chunk_size=2)] * 2

    close([TRANSFORMS[name](mine, z)], [TRANSFORMS[name](plain, z)])


@pytest.mark.parametrize("over", OVER)
def test_compile_in_one_graph(over):
    torch._dynamo.reset()
    decoder = build("tanh")

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, z):
            return 3 * sf.isometry_loss(self.decoder, z, over=over) + z.square().mean()

    module = Loss()
    module(latents(decoder))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (5, 7):
        z = latents(decoder, size)
        leaves = [z, *decoder.parameters()]
        near(results(compiled(z), leaves), results(module(z), leaves), 1e-12)


def test_errors_say_what_to_do():
    decoder = build("tanh")
    with pytest.raises(ValueError, match="over='all' is not one of 'batch', 'sample'"):
        sf.isometry_loss(decoder, latents(decoder), over="all")
    with pytest.raises(ValueError, match=r"probes have shape \(5, 3\): give .* of z, \[5, 4\]"):
        sf.isometry_loss(decoder, latents(decoder), probes=torch.zeros(5, 3).double())
    with pytest.raises(TypeError, match="probes has dtype torch.int64"):
        sf.isometry_loss(decoder, latents(decoder), probes=torch.zeros(5, 4).long())
    with pytest.raises(ValueError, match=r"z must be \[B, m\]"):
        sf.isometry_loss(decoder, torch.zeros(3, dtype=torch.float64))


class TestKernels:
    pytestmark = requires_triton

    @pytest.mark.parametrize("over", OVER)
    @pytest.mark.parametrize("written", [True, False])
    def test_values_and_gradients(self, written, over, monkeypatch):
        grams = []
        monkeypatch.setattr(operator, "gram_of", lambda *a: grams.append(gram_of(*a)) or grams[-1])
        torch.manual_seed(0)
        layers = [nn.Linear(M, 12), nn.ReLU(), nn.Unflatten(1, (3, 2, 2))]
        layers += [nn.ConvTranspose2d(3, 4, 4, stride=2, padding=1), nn.SiLU()]
        layers += [nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1), nn.Sigmoid()]
        decoder = nn.Sequential(*layers).to(DEVICE)
        z = torch.randn(3, M).to(DEVICE).requires_grad_()
        exact, wide = copy.deepcopy(decoder).double(), z.detach().double().requires_grad_()
        want = results(oracle(exact, wide, over), [wide, *exact.parameters()])
        with sf.fused_layers("never" if written else "always"):
            value = sf.isometry_loss(decoder, z, over=over, backend="triton", chunk_size=2)
            mine = results(value, [z, *decoder.parameters()])
        assert {type(gram) is Unwritten for gram in grams} == {not written}
        eps, scale = torch.finfo(torch.float32).eps, max(w.abs().max() for w in want)
        for g, w in zip(mine, want, strict=True):
            assert (g - w).abs().max() <= 64 * eps * scale
