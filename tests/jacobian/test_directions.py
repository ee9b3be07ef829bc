"""Derivatives along a user's own directions: jvp, vjp, tangents=, singular directions."""

import functools

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae.jacobian.run import cache
from tests._triton import DEVICE, requires_triton
from tests.decoders import DECODERS, M, batch, build

K = 3


def close(got, want, tolerance=1e-10):
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        scale = max(1.0, float(theirs.abs().max()))
        assert float((ours - theirs).abs().max()) <= tolerance * scale


def jacobian(decoder, z, *args):
    """f(z) and J [B, m, *out] by reverse mode, with a graph."""
    return sf.decode_with_jacobian(decoder, z, *args, backend="reference")


def directions(z, k=K):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(k, *z.shape, dtype=z.dtype, generator=generator).to(z.device)


def gradients(results, leaves):
    total = sum((t * t.detach().cos()).sum() + t.square().sum() for t in results)
    return torch.autograd.grad(
        total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
    )


@pytest.mark.parametrize("name", DECODERS)
def test_products_and_grams(name):
    decoder = build(name)
    x, z, _ = batch(decoder, 3)
    tangents = directions(z).requires_grad_()
    leaves = [z, *(p for p in decoder.parameters() if p.requires_grad)]
    output, J = jacobian(decoder, z)

    def assert_right(product, want, leaves, **settings):
        wanted = gradients(want, leaves)
        for chunk_size in (None, 2):
            got = [t for t in product(chunk_size=chunk_size, **settings) if t is not None]
            close(got, want)
            close(gradients(got, leaves), wanted)

    want = [output, torch.einsum("kbm,bm...->kb...", tangents, J)]
    assert_right(functools.partial(sf.jvp, decoder, z, tangents), want, [tangents, *leaves])
    close(sf.jvp(decoder, z, tangents[1]), [output, want[1][1]])

    JV = want[1].flatten(2).transpose(0, 1)
    r = (x - output).flatten(1)
    want = [output, JV @ JV.mT, (JV @ r.unsqueeze(-1)).squeeze(-1), r.square().sum(-1)]
    pullback = functools.partial(sf.pullback, decoder, z, tangents=tangents)
    assert_right(functools.partial(pullback, x), want, [x, tangents, *leaves])
    close(pullback()[:2], want[:2])

    cotangents = torch.randn(K, *output.shape, dtype=z.dtype).requires_grad_()
    want = [output, torch.einsum("kb...,bm...->kbm", cotangents, J)]
    got = sf.vjp(decoder, z, cotangents)
    close(got, want)
    close(gradients(got, [cotangents, *leaves]), gradients(want, [cotangents, *leaves]))
    close(sf.vjp(decoder, z, cotangents[0]), [output, want[1][0]])


@pytest.mark.filterwarnings("ignore:.*has no tangent rule")
def test_what_has_no_adjoint_and_what_is_no_module():
    class Digamma(nn.Linear):
        def forward(self, z):
            return super().forward(z).exp().digamma()

    decoder = Digamma(M, 6).double()
    x, z, _ = batch(decoder)
    tangents = directions(z)
    want = sf.pullback(decoder, z, x, tangents=tangents, backend="reference")
    for called in (decoder, lambda z: decoder(z), decoder.forward):
        for chunk_size in (None, 2):
            got = sf.pullback(called, z, x, tangents=tangents, chunk_size=chunk_size)
            close(got, want)
            close(sf.jvp(called, z, tangents), sf.jvp(decoder, z, tangents, backend="reference"))


def test_further_inputs_go_with_their_samples():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.names, self.out = nn.Embedding(3, 5), nn.Linear(M + 5, 7)

        def forward(self, z, label, *, scale):
            return self.out(torch.cat([z, self.names(label)], 1)).tanh() * scale

    decoder = Labelled().double()
    z = torch.randn(5, M, dtype=torch.float64, requires_grad=True)
    label, scale = torch.tensor([0, 2, 1, 1, 0]), torch.tensor(1.5, dtype=torch.float64)
    tangents = directions(z)
    output, J = sf.decode_with_jacobian(decoder, z, label, scale=scale, backend="reference")
    for chunk_size in (None, 2):
        got = sf.jvp(decoder, z, tangents, label, scale=scale, chunk_size=chunk_size)
        close(got, [output, torch.einsum("kbm,bmn->kbn", tangents, J)])
    cotangent = torch.randn_like(output)
    got = sf.vjp(decoder, z, cotangent, label, scale=scale)
    close(got, [output, torch.einsum("bn,bmn->bm", cotangent, J)])


def test_plans_belong_to_the_decoder_and_are_made_once(traces):
    decoder = build("tanh")
    _, z, _ = batch(decoder)
    for _ in range(3):
        sf.jvp(decoder, z, directions(z))
        sf.pullback(decoder, z, tangents=directions(z))
    assert len(traces) == 1
    sf.jvp(decoder, z, directions(z, 2))
    assert len(traces) == 2
    assert id(decoder) in cache._plans


def test_second_order_and_no_graph_where_nothing_asks():
    decoder = build("tanh")
    _, z, _ = batch(decoder)
    tangents = directions(z).requires_grad_()
    torch.autograd.gradgradcheck(lambda z, v: sf.jvp(decoder, z, v), (z, tangents))
    fixed = build("tanh").requires_grad_(False)
    cotangent = torch.randn_like(fixed(z))
    for found in (
        sf.vjp(fixed, z.detach(), cotangent),
        sf.jvp(fixed, z.detach(), tangents.detach()),
    ):
        assert not any(t.requires_grad for t in found)
    with torch.no_grad():
        assert not any(t.requires_grad for t in sf.vjp(decoder, z, cotangent))
    assert z.grad is None and all(p.grad is None for p in decoder.parameters())


def test_directions_that_depend_on_z():
    decoder = nn.Sequential(nn.Linear(M, 8), nn.Tanh(), nn.Linear(8, 9)).double()
    _, z, _ = batch(decoder)

    def gram(z, backend="torch", **settings):
        tangents = torch.stack([z.sin(), 2 * z])
        return sf.pullback(decoder, z, tangents=tangents, backend=backend, **settings).gram

    jacobian = torch.autograd.functional.jacobian
    want = jacobian(lambda z: gram(z, "reference"), z)
    # The last one maps the backward over its cotangents.
    found = jacobian(gram, z), jacobian(lambda z: gram(z, chunk_size=2), z)
    close([*found, jacobian(gram, z, vectorize=True)], [want] * 3)
    hessian = torch.autograd.functional.hessian
    want = hessian(lambda z: gram(z, "reference").square().sum(), z)
    close([hessian(lambda z: gram(z).square().sum(), z)], [want])


def test_compiled_with_directions():
    decoder = nn.Sequential(nn.Linear(M, 8), nn.Tanh(), nn.Linear(8, 9)).double()
    x, z, _ = batch(decoder)
    tangents = directions(z).requires_grad_()
    sf.pullback(decoder, z, x, tangents=tangents)

    def total(z, x, tangents):
        found = sf.pullback(decoder, z, x, tangents=tangents)
        return sum(t.square().sum() for t in found)

    leaves = [z, tangents, *decoder.parameters()]
    want = total(z, x, tangents)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    got = compiled(z, x, tangents)
    close([got], [want])
    close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


@pytest.mark.parametrize(
    ("tangents", "error", "message"),
    [
        (torch.zeros(5, M), TypeError, "float32 but z is torch.float64"),
        (torch.zeros(2, 5, M + 1).double(), ValueError, r"give \[k, B, m\]"),
        (torch.zeros(0, 5, M).double(), ValueError, "k >= 1"),
        (torch.zeros(4, M).double(), ValueError, r"shape \(4, 4\)"),
        (torch.zeros(5, M, dtype=torch.int64), TypeError, "floating-point"),
        ([0.0], TypeError, "give a torch.Tensor"),
    ],
)
def test_wrong_directions(tangents, error, message):
    decoder = nn.Linear(M, 3).double()
    z = torch.randn(5, M).double()
    with pytest.raises(error, match=message) as found:
        sf.jvp(decoder, z, tangents)
    assert "\n" not in str(found.value)
    if isinstance(tangents, torch.Tensor) and tangents.dim() == 3:
        with pytest.raises(error, match=message):
            sf.pullback(decoder, z, tangents=tangents)


def test_wrong_cotangents_and_decoders():
    z = torch.randn(5, M)
    with pytest.raises(ValueError, match=r"give the decoder's \(5, 3\)"):
        sf.vjp(nn.Linear(M, 3), z, torch.zeros(5, 4))
    with pytest.raises(
        RuntimeError, match=r"on z of shape \(5, 4\) in decoder\[0\].* m = 4 latents"
    ):
        sf.jvp(nn.Sequential(nn.Linear(M + 1, 3)), z, torch.zeros(2, 5, M))
    mixing = nn.Sequential(nn.Linear(M, 3), nn.BatchNorm1d(3))
    for product, given in ((sf.vjp, torch.zeros(5, 3)), (sf.jvp, z)):
        with pytest.raises(RuntimeError, match=r"decoder\[1\]"):
            product(mixing, z, given)


@pytest.mark.parametrize("m", [6, 300])
def test_singular_directions(m):
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(m, 40), nn.Tanh(), nn.Linear(40, 30), nn.Unflatten(1, (5, 6)))
    decoder = decoder.double()
    z = 0.1 * torch.randn(3, m, dtype=torch.float64, requires_grad=True)
    _, J = jacobian(decoder, z)
    _, want, _ = torch.linalg.svd(J.flatten(2).mT)
    generator = torch.Generator().manual_seed(0)
    found = sf.singular_directions(decoder, z, 2, steps=100, tol=1e-13, generator=generator)
    assert found.converged.all() and not found.values.requires_grad
    close([found.values], [want[:, :2].detach()])
    pushed = torch.einsum("bkm,bm...->bk...", found.right, J)
    close([pushed], [found.values[..., None, None] * found.left], 1e-8)
    unit = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    close(
        [found.right @ found.right.mT, found.left.flatten(2) @ found.left.flatten(2).mT], [unit] * 2
    )
    assert (found.right.amax(-1) == found.right.abs().amax(-1)).all()


def test_small_singular_values_keep_their_digits():
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64)).Q for n in (30, 4))
    decoder = nn.Linear(4, 30, bias=False)
    values = torch.tensor([1.0, 0.5, 1e-3, 1e-5], dtype=torch.float64)
    decoder.weight.data = (U * values) @ V.T
    found = sf.singular_directions(decoder.float(), torch.zeros(2, 4), 4)
    # Through G alone the last one, 1e-10 of G's largest eigenvalue, would be lost in float32.
    assert torch.allclose(found.values.double(), values.expand(2, 4), rtol=1e-2)


def test_singular_directions_of_a_lower_rank():
    decoder = nn.Linear(4, 2).double()
    z = torch.zeros(3, 4).double()
    assert sf.singular_directions(decoder, z, 2).values.shape == (3, 2)
    for k in (0, 5, True, 2.0):
        with pytest.raises(ValueError, match="give an int from 1 to m = 4"):
            sf.singular_directions(decoder, z, k)
    with pytest.raises(ValueError, match="more than the 2 numbers"):
        sf.singular_directions(decoder, z, 3)
    with torch.no_grad():
        decoder.weight[1] = 0
    found = sf.singular_directions(decoder, z, 2)
    assert float(found.values[:, 1].abs().max()) < 1e-12 and torch.isfinite(found.left).all()


class TestTriton:
    pytestmark = requires_triton

    @pytest.mark.parametrize("name", ["tanh", "higgins"])
    def test_products_and_grams(self, name):
        decoder = build(name)
        x, z, _ = batch(decoder)
        tangents = directions(z)
        output, J = jacobian(decoder, z)
        JV = torch.einsum("kbm,bm...->bk...", tangents, J)
        leaves = [z, *decoder.parameters()]
        r = (x - output).flatten(1)
        want = [JV.flatten(2) @ JV.flatten(2).mT, (JV.flatten(2) @ r.unsqueeze(-1)).squeeze(-1)]
        want_grads = gradients(want, leaves)
        decoder = decoder.float().to(DEVICE)
        z, x, tangents = (t.detach().float().to(DEVICE).requires_grad_() for t in (z, x, tangents))
        leaves = [z, *decoder.parameters()]
        _, derivatives = sf.jvp(decoder, z, tangents, backend="triton")
        close([derivatives.cpu().double().transpose(0, 1)], [JV], 1e-5)
        for chunk_size in (None, 2):
            options = {"tangents": tangents, "backend": "triton", "chunk_size": chunk_size}
            found = sf.pullback(decoder, z, x, **options)
            got = [found.gram, found.projection]
            close([t.cpu().double() for t in got], want, 1e-5)
            close([g.cpu().double() for g in gradients(got, leaves)], want_grads, 2e-4)
