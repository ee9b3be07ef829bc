"""The pullback metric and its derivative, against reverse mode over reverse mode."""

import functools

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

import fastsfvae as sf
from fastsfvae.gram import operator, query
from fastsfvae.gram.operator import gram_of
from tests._triton import DEVICE, requires_triton
from tests.decoders import DECODERS, M, build
from tests.jacobian import test_torch_func as norms

SMOOTH = [name for name in DECODERS if name not in ("higgins", "pixel_shuffle", "weight_norm")]


def exact(decoder, z):
    """G and dG_ij/dz_l, by reverse mode over reverse mode, one sample after the other."""

    def metric(sample):
        J = jacobian(lambda s: decoder(s[None])[0].flatten(), sample, create_graph=True)
        return J.mT @ J

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = [(metric(sample).detach(), jacobian(metric, sample)) for sample in z.detach()]
    return tuple(map(torch.stack, zip(*found, strict=True)))


def close(found, want, tolerance=1e-10):
    for mine, right in zip(found, want, strict=True):
        assert mine.shape == right.shape and right.abs().max() > 0
        assert (mine - right).abs().max() <= tolerance * right.abs().max()


def points(size=5, m=M, dtype=torch.float64):
    g = torch.Generator().manual_seed(size)
    return torch.randn(size, m, generator=g, dtype=torch.float64).to(dtype)


def refuse(*_):
    raise AssertionError("this went through autograd")


@pytest.mark.parametrize("name", SMOOTH)
def test_against_reverse_mode(name, monkeypatch):
    decoder, z = build(name), points(3)
    want = exact(decoder, z)
    close(sf.metric(decoder, backend="reference")(z, derivative=True), want)
    monkeypatch.setattr(query, "recomputed", refuse)
    for chunk_size in (None, 1, 7):
        metric = sf.metric(decoder, chunk_size=chunk_size)
        close(metric(z, derivative=True), want)
        close([metric(z)], want[:1])
    close(metric(z[:1], derivative=True), [t[:1] for t in want])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["higgins", "pixel_shuffle", "weight_norm"])
def test_a_decoder_that_is_linear_around_a_point(name):
    decoder, z = build(name), points(1)
    want = exact(decoder, z)
    G, dG = sf.metric(decoder)(z, derivative=True)
    close([G], want[:1])
    assert not want[1].any() and (dG.abs() <= 1e-10 * G.abs().max()).all()


@pytest.mark.parametrize("name", norms.NORMS)
def test_behind_norms(name):
    decoder, z = norms.build(name), points(4, norms.M)
    want = exact(decoder, z)
    found = sf.metric(decoder)(z, derivative=True)
    close(found, want, 1e-13)

    def gram(s):
        J = torch.func.jacfwd(lambda s: decoder(s[None])[0])(s)
        return J.mT @ J

    # Not asserted: a PyTorch that has been fixed is welcome.
    for mode in (torch.func.jacfwd, torch.func.jacrev):
        theirs = torch.func.vmap(mode(gram))(z)
        error, ours = ((t - want[1]).abs().max() / want[1].abs().max() for t in (theirs, found[1]))
        print(f"{name}: error of {mode.__name__} of jacfwd {error:.1e}, ours {ours:.1e}")


class Sphere(nn.Module):
    """Polar angles to the unit sphere."""

    def forward(self, z):
        theta, phi = z.unbind(1)
        sine = theta.sin()
        return torch.stack([sine * phi.cos(), sine * phi.sin(), theta.cos()], 1)


def test_the_sphere():
    z = torch.rand(6, 2, dtype=torch.float64) + 0.5
    G, dG = torch.zeros(6, 2, 2).double(), torch.zeros(6, 2, 2, 2).double()
    theta = z[:, 0]
    G[:, 0, 0], G[:, 1, 1], dG[:, 1, 1, 0] = 1, theta.sin().square(), (2 * theta).sin()
    close(sf.metric(Sphere())(z, derivative=True), (G, dG), 1e-14)


def test_a_chunk_holds_so_many_tangents_and_no_more(monkeypatch):
    decoder, seen = build("tanh"), []
    monkeypatch.setattr(operator, "gram_of", lambda *a: seen.append(gram_of(*a)) or seen[-1])
    sf.metric(decoder, chunk_size=7)(points(), derivative=True)
    # G's chunk of 5 points with 4 tangents, then 50 copies with one.
    assert [gram.sums()[0].shape for gram in seen] == [
        (5, 4, 4),
        *[(7, 1, 1)] * 2,
        *[(6, 1, 1)] * 6,
    ]


def test_latents_of_very_different_effect():
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 7)).double()
    effect = torch.tensor([1, 1e-7, 0], dtype=torch.float64)
    with torch.no_grad():
        decoder[0].weight.mul_(effect)
    z = points(m=3)
    (G, dG), want = sf.metric(decoder)(z, derivative=True), exact(decoder, z)
    # By each entry's own size; of a latent without any effect nothing tells it.
    size = effect.where(effect > 0, 1)
    pair = size[:, None] * size
    assert ((G - want[0]).abs() <= 1e-10 * pair * want[0].abs().max()).all()
    assert ((dG - want[1]).abs() <= 1e-10 * pair.unsqueeze(-1) * size * want[1].abs().max()).all()
    assert (want[1][:, 1, 1, 1].abs() > 1e-24).all()


class Given(nn.Module):
    """A decoder with further inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.offset = nn.Linear(2, 5).double(), nn.Parameter(torch.randn(6).double())

    def forward(self, z, last, power=1.0):
        return (self.first(z).tanh() @ last + self.offset).sinh() * power

    def named(self, z, last):
        return self(z, last, 2.0)


WAYS = {
    "module": lambda decoder, last: sf.metric(decoder, last, power=2.0),
    "by name": lambda decoder, last: sf.metric(decoder, power=2.0, last=last),
    "method": lambda decoder, last: sf.metric(decoder.named, last),
    "partial": lambda decoder, last: sf.metric(functools.partial(decoder, last=last, power=2.0)),
    "function": lambda decoder, last: sf.metric(lambda z, last: decoder.named(z, last), last),
    "closure": lambda decoder, last: sf.metric(lambda z: decoder(z, last, 2.0)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_further_inputs_have_no_batch_axis(way, size):
    """As many points, or copies of them, as a further input has rows, change nothing."""
    decoder, last = Given(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    metric = WAYS[way](decoder, last)

    def alone(z):
        return decoder(z, last, 2.0)

    # 3 entries of 5 rows: copies are 3, 6, 15.
    z = points(size, 2)
    close(metric(z, derivative=True), exact(alone, z))
    wanted = [last, decoder.first.weight]
    weights = torch.linspace(-1, 2, size * 4, dtype=torch.float64).view(size, 2, 2)
    found = torch.autograd.grad((metric(z) * weights).sum(), wanted)
    right = sum(
        w.flatten() @ (J.mT @ J).flatten()
        for w, J in ((w, jacobian(lambda s: alone(s[None])[0], s, create_graph=True))
                     for w, s in zip(weights, z, strict=True))
    )  # fmt: skip
    close(found, torch.autograd.grad(right, wanted))


def test_a_batched_further_input_is_refused():
    decoder = Given()
    last = torch.randn(4, 5, 6, dtype=torch.float64)
    with pytest.raises((RuntimeError, ValueError)) as raised:
        sf.metric(decoder, last)(points(4, 2), derivative=True)
    assert "\n" not in str(raised.value)


def test_the_metric_follows_the_decoder():
    decoder, z = Given(), points(3, 2)
    last = torch.randn(5, 6, dtype=torch.float64)
    metric = sf.metric(decoder, last)
    before = metric(z, derivative=True)
    with torch.no_grad():
        decoder.first.weight.mul_(1.5)
        last.add_(0.1)
    after = metric(z, derivative=True)
    close(after, exact(lambda z: decoder(z, last), z))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(before, after, strict=True))


def test_the_derivative_is_that_of_the_metric_and_has_no_graph():
    decoder, z = build("layer_norm"), points().requires_grad_()
    metric = sf.metric(decoder)
    G, dG = metric(z, derivative=True)
    assert not G.requires_grad and not dG.requires_grad and not z.grad
    alive = metric(z)
    assert alive.requires_grad
    for i, j in ((0, 0), (1, 3), (3, 1)):
        (row,) = torch.autograd.grad(alive[:, i, j].sum(), z, retain_graph=True)
        close([dG[:, i, j]], [row])
    with torch.no_grad():
        close(metric(z, derivative=True), (G, dG), 1e-14)
    with torch.inference_mode():
        close(metric(points(), derivative=True), (G, dG), 1e-14)


def test_no_transform_takes_the_derivative_for_constant():
    metric, z = sf.metric(build("tanh")), points()
    with pytest.raises(RuntimeError, match="is not made inside a transform of torch.func"):
        torch.func.grad(lambda z: metric(z, derivative=True)[1].sum())(z)
    close(
        [torch.func.grad(lambda z: metric(z)[:, 0, 1].sum())(z)],
        [metric(z, derivative=True)[1][:, 0, 1]],
    )


def test_an_output_that_does_not_depend_on_the_latents():
    class Constant(nn.Linear):
        def forward(self, z):
            return self.bias.expand(len(z), -1)

    for backend in ("torch", "reference"):
        found = sf.metric(Constant(2, 3).double(), backend=backend)(points(4, 2), derivative=True)
        assert [t.shape for t in found] == [(4, 2, 2), (4, 2, 2, 2)]
        assert not any(t.any() for t in found)


@pytest.mark.filterwarnings("ignore:.*has no tangent rule")
def test_a_decoder_without_adjoints():
    class Digamma(nn.Linear):
        def forward(self, z):
            return super().forward(z).exp().digamma()

    torch.manual_seed(0)
    decoder, z = Digamma(3, 6).double(), points(4, 3)
    for chunk_size in (None, 3):
        close(sf.metric(decoder, chunk_size=chunk_size)(z, derivative=True), exact(decoder, z))


def in_float32(name, device, backend):
    """Within twice the error of reverse mode in float32, and a few roundings."""
    want = exact(build(name), points(3))
    decoder, z = build(name, torch.float32), points(3, dtype=torch.float32)
    plain = exact(decoder, z)
    found = sf.metric(decoder.to(device), backend=backend)(z.to(device), derivative=True)
    for mine, peer, right in zip(found, plain, want, strict=True):
        assert mine.dtype == torch.float32
        bound = 2 * (peer - right).abs().max() + 16 * 2**-23 * right.abs().max()
        assert (mine.cpu() - right).abs().max() <= bound


@pytest.mark.parametrize("name", ["residual", "tanh", "layer_norm", "upsampled"])
def test_float32(name):
    in_float32(name, "cpu", "torch")


class Fused(nn.Sequential):
    """Layers that kernels take, with a curved activation in front of the last one."""

    def __init__(self):
        torch.manual_seed(0)
        first = nn.Linear(M, 8), nn.SiLU(), nn.Unflatten(1, (2, 2, 2))
        super().__init__(*first, nn.ConvTranspose2d(2, 3, 4, 2, 1), nn.Tanh(), nn.Conv2d(3, 2, 3))


@pytest.mark.parametrize("fused", ["always", "never"])
@pytest.mark.parametrize("name", ["tanh", "layer_norm", "fused"])
class TestTriton:
    pytestmark = requires_triton

    def test_values(self, name, fused, monkeypatch):
        monkeypatch.setitem(DECODERS, "fused", Fused)
        with sf.fused_layers(fused):
            in_float32(name, DEVICE, "triton")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d: sf.metric(3), "decoder must be an nn.Module or a callable, got int"),
        (lambda d: sf.metric(d, chunk_size=0), "chunk_size must be None or an int >= 1, got 0"),
        (lambda d: sf.metric(d, backend="gpu")(points()), "backend='gpu' is not one of"),
        (lambda d: sf.metric(d)([1.0]), "z is a list: give a torch.Tensor"),
        (lambda d: sf.metric(d)(points()[0]), r"z must be \[B, m\] with B, m >= 1, got shape"),
        (lambda d: sf.metric(d)(points()[:0], derivative=True), r"got shape \(0, 4\)"),
        (lambda d: sf.metric(d)(points()[:, :0], derivative=True), r"got shape \(5, 0\)"),
        (lambda d: sf.metric(d)(points().long(), derivative=True), "z must be a floating point"),
        (lambda d: sf.metric(d)(points().float(), derivative=True), "z is torch.float32 but"),
        (lambda d: sf.metric(d)(points(m=3), derivative=True), r"z of shape \(5, 3\)"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(call, message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message) as raised:
        call(build("tanh"))
    assert "\n" not in str(raised.value)
