"""The pullback on the operator: its values, its gradients, and what users wrap around it."""

import functools
import weakref

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import fastsfvae as sf
from fastsfvae.gram import autograd, operator, query
from fastsfvae.gram.contracted import Contracted, ThroughLayer
from fastsfvae.gram.operator import gram_of
from fastsfvae.jacobian.rules import convolution as rules
from fastsfvae.jacobian.run.sweep import Program
from fastsfvae.ops import convolution
from tests.decoders import DECODERS, M, batch, build
from tests.gram.test_operator import close


def wide():
    """A decoder whose last layer pays to be contracted."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(M, 5), nn.Tanh(), nn.Linear(5, 60), nn.Unflatten(1, (3, 20)))


BUILD = {name: functools.partial(build, name) for name in DECODERS} | {
    "wide": lambda: wide().double()
}


def pulled(decoder, z, x=None, backend="torch", **settings):
    """The fields that there are."""
    found = sf.pullback(decoder, z, x, backend=backend, **settings)
    return [t for t in found if t is not None]


def weighted(tensors):
    """A function of all of them whose second derivative in them is not zero."""
    # Not drawn: transforms refuse random numbers.
    weights = [torch.arange(t.numel()).mul(2.4).cos().view(t.shape).to(t) for t in tensors]
    return sum((w * (t + 0.1 * t.square())).sum() for w, t in zip(weights, tensors, strict=True))


def refuse(*_):
    raise AssertionError("this went through autograd")


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", BUILD)
def test_values_and_gradients(name, given, monkeypatch):
    decoder = BUILD[name]()
    x, z, _ = batch(decoder)
    x = x if given else None
    leaves = [z, *(p for p in decoder.parameters() if p.requires_grad), *([x] if given else [])]

    def results(**settings):
        found = pulled(decoder, z, x, **settings)
        grads = torch.autograd.grad(weighted(found), leaves, allow_unused=True)
        return [t.detach() for t in found], [g for g in grads if g is not None]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want, want_grads = results(backend="reference")
    monkeypatch.setattr(query, "recomputed", refuse)
    for chunk_size in (None, 1, 2):
        found, grads = results(chunk_size=chunk_size)
        close(found, want)
        close(grads, want_grads)


def test_both_ways_through_a_last_linear_layer(monkeypatch):
    x, z, _ = batch(decoder := BUILD["wide"]())
    grams, leaves = [], [x, z, *decoder.parameters()]
    monkeypatch.setattr(operator, "gram_of", lambda *a: grams.append(gram_of(*a)) or grams[-1])
    want = torch.autograd.grad(weighted(pulled(decoder, z, x, "reference")), leaves)
    close(torch.autograd.grad(weighted(pulled(decoder, z, x)), leaves), want)
    monkeypatch.setattr(Contracted, "_keeps_digits", lambda *_: False)
    close(torch.autograd.grad(weighted(pulled(decoder, z, x)), leaves), want)
    assert [type(gram) for gram in grams] == [Contracted, ThroughLayer]


@pytest.mark.filterwarnings("ignore:.*has no tangent rule")
def test_a_decoder_without_adjoints():
    class Digamma(nn.Linear):
        def forward(self, z):
            return super().forward(z).exp().digamma()

    decoder = Digamma(M, 6).double()
    x, z, _ = batch(decoder)
    close(pulled(decoder, z, x, chunk_size=2), pulled(decoder, z, x, "reference"))


def test_a_graph_is_used_twice_and_notices_what_has_changed():
    decoder = build("tanh")
    x, z, _ = batch(decoder)
    for chunk_size in (None, 2):
        value = weighted(pulled(decoder, z, x, chunk_size=chunk_size))
        first = torch.autograd.grad(value, [z, *decoder.parameters()], retain_graph=True)
        again = torch.autograd.grad(value, [z, *decoder.parameters()], retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        with torch.no_grad():
            decoder[0].weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(value, z)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_no_gradient_is_computed_that_nobody_asked_for(chunk_size, monkeypatch):
    decoder = build("higgins")
    x, z, _ = batch(decoder)
    value = weighted(pulled(decoder, z, x, chunk_size=chunk_size))
    want = torch.autograd.grad(value, [z, *decoder.parameters()], retain_graph=True)
    asked = []

    def counted(grad, x, weight, geometry, needs):
        asked.append(needs)
        return convolution.convolve_backward(grad, x, weight, geometry, needs)

    monkeypatch.setattr(rules, "convolve_backward", counted)
    value = weighted(pulled(decoder, z, x, chunk_size=chunk_size))
    close(torch.autograd.grad(value, z), want[:1], 1e-14)
    close([torch.func.grad(lambda z: weighted(pulled(decoder, z, x)))(z.detach())], want[:1], 1e-12)
    assert asked and not any(of_weight for _, of_weight in asked)


def test_results_belong_to_the_user():
    decoder = nn.Sequential(nn.Linear(M, 6), nn.Sigmoid()).double()
    x, z, _ = batch(decoder)
    want = torch.autograd.grad(pulled(decoder, z, x)[1].sum(), z)
    found = pulled(decoder, z, x)
    gram = found[1].sum()
    with torch.no_grad():
        # The derivative of a sigmoid is made of its result.
        found[0].zero_()
    close(torch.autograd.grad(gram, z), want, 0)
    # A decoder that returns its latents does not give away their memory.
    alike = sf.pullback(nn.Identity(), z.detach()).output
    assert alike.data_ptr() != z.data_ptr()


@pytest.mark.parametrize("name", ["tanh", "wide"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_second_order(name, chunk_size):
    decoder = BUILD[name]()
    x, z, _ = (t.detach()[:3] for t in batch(decoder))

    # The cotangents of G depend on z as well.
    def value(z, backend="torch"):
        return weighted(pulled(decoder, z, x, backend, chunk_size=chunk_size)).sin()

    hessian = torch.autograd.functional.hessian(value, z)
    close([hessian], [torch.autograd.functional.hessian(lambda z: value(z, "reference"), z)])


def test_second_order_in_everything():
    decoder = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    z, x = torch.randn(2, 2).double(), torch.randn(2, 3).double()
    leaves = [t.requires_grad_() for t in (z, x, *decoder.parameters())]

    def outputs(z, x, *parameters):
        names = [name for name, _ in decoder.named_parameters()]
        with torch.nn.utils.stateless._reparametrize_module(
            decoder, dict(zip(names, parameters, strict=True))
        ):
            return tuple(sf.pullback(decoder, z, x))

    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradgradcheck(outputs, leaves)


def of_gradient(value, z, wanted):
    """The gradient by `wanted` of a sum of squares of the gradient by z."""
    (first,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    return torch.autograd.grad(first.square().sum(), wanted, allow_unused=True)[0]


def test_second_order_where_something_is_constant():
    decoder, (x, z, log_var) = build("tanh"), batch(build("tanh"))
    frozen = nn.Linear(M, 7).double().requires_grad_(False)
    results = []
    for backend in ("torch", "reference"):
        expected = sf.sampling_free_elbo(
            decoder, x, z, log_var, likelihood="expected", backend=backend
        )
        alone = sf.pullback(frozen, z, x, backend=backend)
        found = [of_gradient(expected.elbo, z, z), of_gradient(alone.squared_error, z, z)]
        whole = sf.pullback(decoder, z, backend=backend)
        # The gradient of a sum by the last bias is a number.
        bias = decoder[-1].bias
        (first,) = torch.autograd.grad(whole.output.sum(), bias, create_graph=True)
        found += torch.autograd.grad(first.square().sum() + whole.gram.sum(), z)
        results.append(found)
    close(*results)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_second_order_of_a_decoder_first_met_in_small_chunks(chunk_size):
    decoder = build("tanh")
    x, z, _ = batch(decoder)
    mine = of_gradient(sf.pullback(decoder, z, x, chunk_size=chunk_size).gram.square(), z, z)
    right = sf.pullback(decoder, z, x, backend="reference").gram.square()
    close([mine], [of_gradient(right, z, z)])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none", None])
def test_inside_a_checkpoint(reentrant, reduction):
    decoder = build("tanh")
    x, z, log_var = batch(decoder)

    def value(z):
        if reduction is None:
            return weighted(pulled(decoder, z, x))
        return sf.SamplingFreeLoss(decoder, reduction=reduction)(x, z, log_var).sum()

    value(z).backward()
    want, z.grad = z.grad, None
    saved = torch.utils.checkpoint.checkpoint(value, z, use_reentrant=reentrant)
    saved.backward()
    close([z.grad], [want], 1e-14)


def test_a_checkpoint_keeps_no_tangents(monkeypatch):
    decoder = build("tanh")
    x, z, _ = batch(decoder)
    pulled(decoder, z, x)
    loops = weakref.WeakSet()
    made = autograd.Loop.__init__
    monkeypatch.setattr(
        autograd.Loop, "__init__", lambda loop, *a, **k: (loops.add(loop), made(loop, *a, **k))[1]
    )
    plain = pulled(decoder, z, x)
    assert len(loops) == 1
    del plain
    saved = torch.utils.checkpoint.checkpoint(
        lambda z: weighted(pulled(decoder, z, x)), z, use_reentrant=False
    )
    assert not loops and saved.requires_grad


TRANSFORMS = {
    "grad": lambda f, z: torch.func.grad(lambda z: weighted(f(z)))(z),
    "grad of grad": lambda f, z: torch.func.grad(
        lambda z: torch.func.grad(lambda z: weighted(f(z)).sin())(z).square().sum()
    )(z),
    "jacrev": lambda f, z: torch.func.jacrev(lambda z: f(z)[1])(z),
    "jacfwd": lambda f, z: torch.func.jacfwd(lambda z: f(z)[1])(z),
    "hessian": lambda f, z: torch.func.hessian(lambda z: weighted(f(z)))(z),
    "vmap": lambda f, z: torch.func.vmap(lambda z: f(z)[1])(torch.stack([z, 2 * z])),
    "vmap of grad": lambda f, z: torch.func.vmap(torch.func.grad(lambda z: weighted(f(z))))(
        torch.stack([z, 2 * z])
    ),
    "jvp": lambda f, z: torch.func.jvp(lambda z: f(z)[1], (z,), (z.cos(),))[1],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms(name, monkeypatch):
    decoder = build("tanh")
    x, z, _ = (t.detach() for t in batch(decoder))
    transform = TRANSFORMS[name]
    want = transform(lambda z: pulled(decoder, z, x, "reference"), z)
    if name == "grad":
        monkeypatch.setattr(query, "recomputed", refuse)
    close([transform(lambda z: pulled(decoder, z, x, chunk_size=2), z)], [want])


def test_a_gradient_of_a_gradient_through_a_transform_and_past_it():
    decoder = build("tanh")
    x, z, _ = batch(decoder)

    def outer(backend):
        inner = torch.func.grad(lambda z: weighted(pulled(decoder, z, x, backend)).sin())(z)
        return torch.autograd.grad(inner.square().sum(), [z, *decoder.parameters()])

    close(outer("torch"), outer("reference"))


def test_several_cotangents_at_once_and_forward_mode():
    decoder = build("tanh")
    x, z, _ = batch(decoder)
    directions = torch.randn(3, 5, M, M, dtype=torch.float64)
    results = [
        torch.autograd.grad(pulled(decoder, z, x, b)[1], z, directions, is_grads_batched=True)
        for b in ("torch", "reference")
    ]
    close(*results)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(z.detach(), z.detach().cos())
        tangents = [
            [forward_ad.unpack_dual(t).tangent for t in pulled(decoder, dual, x, b)]
            for b in ("torch", "reference")
        ]
    close(*tangents)


@pytest.mark.parametrize("name", ["higgins", "weight_norm", "wide", "residual"])
def test_compile_in_one_graph_for_all_batch_sizes(name):
    torch._dynamo.reset()
    decoder = BUILD[name]()

    class Pulled(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, z, x):
            return tuple(sf.pullback(self.decoder, z, x, chunk_size=2))

    module = Pulled()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for size in (5, 7, 9):
        x, z, _ = batch(decoder, size)
        results = []
        for call in (module, compiled):
            found = call(z, x)
            grads = torch.autograd.grad(weighted(found), [x, z, *decoder.parameters()])
            results.append([*(t.detach() for t in found), *grads])
        close(*results, tolerance=1e-12)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]


@pytest.mark.parametrize("given", [True, False])
def test_an_exported_graph_outlives_the_process(given):
    decoder = build("tanh")
    x, z, _ = (t.detach() for t in batch(decoder))

    class Pulled(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, z, x):
            return tuple(pulled(self.decoder, z, x if given else None))

    module = Pulled()
    module(z, x)
    exported = torch.export.export(module, (z, x), strict=False)
    # A program's number means nothing elsewhere.
    assert not any("fastsfvae" in str(node.target) for node in exported.graph.nodes)
    close(exported.module()(z + 1, x), module(z + 1, x), 1e-14)


def test_autocast():
    decoder, exact = build("higgins", torch.float32), build("higgins")
    x, z, _ = batch(decoder, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = sf.pullback(decoder, z, x, chunk_size=2)
        alone = sf.pullback(decoder, z)
    assert found.output.dtype == alone.output.dtype == torch.bfloat16
    assert found.gram.dtype == found.projection.dtype == torch.float32
    grads = torch.autograd.grad(weighted(found), [x, z, *decoder.parameters()])
    x, z, _ = batch(exact)
    want = sf.pullback(exact, z, x)
    want_grads = torch.autograd.grad(weighted(want), [x, z, *exact.parameters()])
    for mine, right in zip((*found, *grads), (*want, *want_grads), strict=True):
        assert (mine - right).abs().max() <= 16 * 2**-8 * right.abs().max()
        assert mine.dtype in (torch.float32, torch.bfloat16)


def test_several_chunks_wait_for_the_backward_where_they_are_small(monkeypatch):
    decoder = build("higgins")
    x, z, _ = batch(decoder, 6)
    leaves = [z, *decoder.parameters()]
    value = weighted(pulled(decoder, z, x))
    want = torch.autograd.grad(value, leaves)
    monkeypatch.setattr("fastsfvae.gram.query.default_chunk", lambda linearizer: 2)
    ran, run = [], Program.body

    def counted(self, *args, **kwargs):
        ran.append(1)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Program, "body", counted)

    def chunks(**settings):
        """How many ran in the forward and in the first backward; a second computes them again."""
        ran.clear()
        value = weighted(pulled(decoder, z, x, **settings))
        forward = len(ran)
        found = [torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2)]
        for grads in found:
            close(grads, want)
        narrow = weighted(pulled(decoder, z, x, **settings))
        close(torch.autograd.grad(narrow, leaves[1:3]), want[1:3])
        return forward

    assert chunks() == 3 and len(ran) == 3 + 3 + 3
    # Who says how many samples' tangents may exist at one time is heeded.
    assert chunks(chunk_size=2) == 3 and len(ran) == 3 + 3 + 3 + 3 + 3
    monkeypatch.setattr(operator, "_HELD", 0)
    assert chunks() == 3 and len(ran) == 3 + 3 + 3 + 3 + 3
