"""The loss whose gradients are finished chunk by chunk in its forward, by hand-written adjoints."""

import pytest
import torch

import fastsfvae as sf
from fastsfvae.gram import query as queries
from fastsfvae.gram.query import Query, prepare
from fastsfvae.jacobian.rules.registry import RULES
from tests.decoders import DECODERS, batch, build
from tests.jacobian.rule_cases import CASES

LIKELIHOODS = ("precision", "mixture", "normalized", "expected")


def gradients(decoder, tensors, *, chunk_size=None, backend="torch", reduction="sum", **settings):
    """Value and gradients of a weighted loss in the inputs, c, gamma and every parameter."""
    dtype = tensors[0].dtype
    c = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    gamma = torch.tensor(0.6, dtype=dtype, requires_grad=True)
    weight = torch.linspace(0.5, 2, len(tensors[0]), dtype=dtype)
    loss = sf.SamplingFreeLoss(
        decoder, noise_var=c, gamma=gamma, kl_weight=0.7, reduction=reduction, backend=backend,
        chunk_size=chunk_size, **settings,
    )  # fmt: skip
    value = loss(*tensors, sample_weight=weight)
    leaves = [*tensors, c, gamma, *(p for p in decoder.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)
    return value.detach().sum(), *grads


def recomputed(monkeypatch, *args, **kwargs):
    """The same by autograd over each chunk."""
    with monkeypatch.context() as patch:
        patch.setattr(queries, "prepare", lambda _: None)
        return gradients(*args, **kwargs)


def close(ours, theirs, tolerance=1e-10):
    for mine, want in zip(ours, theirs, strict=True):
        assert (mine - want).abs().max() <= tolerance * (1 + want.abs().max())


def query(decoder, tensors, **changes):
    """What the loss asks of a decoder."""
    x, mean, log_var = tensors
    inputs = mean.view_as(mean), log_var, *map(torch.tensor, (0.3, 0.6, 1.0))
    asked = Query("precision", decoder, mean, x, inputs, (), {}, "torch", None)
    return asked._replace(**changes)


def is_swept(decoder, tensors):
    return prepare(query(decoder, tensors)) is not None


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_an_output_whose_tangents_lie_in_any_order(monkeypatch, chunk_size):
    # The first linear layer's tangents are its weight's columns: m is their fastest axis here.
    lift = torch.nn.Linear(4, 12), torch.nn.Unflatten(1, (2, 2, 3)), torch.nn.PReLU()
    decoder = torch.nn.Sequential(*lift).double()
    tensors = batch(decoder)
    want = recomputed(monkeypatch, decoder, tensors)
    close(gradients(decoder, tensors, chunk_size=chunk_size), want)


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_equal_reverse_mode_for_every_chunk_size(name, monkeypatch):
    decoder = build(name)
    tensors = batch(decoder)
    assert is_swept(decoder, tensors)
    want = recomputed(monkeypatch, decoder, tensors)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        close(gradients(decoder, tensors, backend="reference"), want)
    for chunk_size in (1, 3, 5, None):
        for reduction in ("sum", "none"):
            close(gradients(decoder, tensors, chunk_size=chunk_size, reduction=reduction), want)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood(likelihood, monkeypatch):
    decoder = build("tanh")
    tensors = batch(decoder)
    want = recomputed(monkeypatch, decoder, tensors, likelihood=likelihood)
    for reduction in ("sum", "none"):
        ours = gradients(decoder, tensors, likelihood=likelihood, chunk_size=2, reduction=reduction)
        close(ours, want)


def test_each_term_has_its_own_gradient(monkeypatch):
    decoder = build("residual")
    x, mean, log_var = batch(decoder)
    g = torch.Generator().manual_seed(3)
    weights = torch.randn(6, len(x), generator=g, dtype=torch.float64)

    def grads(chunk_size):
        terms = sf.sampling_free_elbo(decoder, x, mean, log_var, chunk_size=chunk_size)
        total = (torch.stack(terms) * weights).sum()
        return torch.autograd.grad(total, [x, mean, log_var, *decoder.parameters()])

    ours = grads(2)
    monkeypatch.setattr(queries, "prepare", lambda _: None)
    close(ours, grads(None))


def test_float32_error_is_within_twice_that_of_autograd(monkeypatch):
    for name in ("higgins", "residual"):
        exact = build(name)
        want = recomputed(monkeypatch, exact, batch(exact))
        decoder = build(name, torch.float32)
        tensors = batch(decoder, dtype=torch.float32)
        plain = recomputed(monkeypatch, decoder, tensors)
        ours = gradients(decoder, tensors, chunk_size=2)
        for mine, theirs, truth in zip(ours, plain, want, strict=True):
            scale = truth.abs().max()
            bound = 2 * (theirs - truth).abs().max() + 16 * torch.finfo(torch.float32).eps * scale
            assert (mine - truth).abs().max() <= bound


def test_second_order_needs_reduction_none(monkeypatch):
    decoder = build("tanh")
    x, mean, log_var = batch(decoder)
    loss = sf.SamplingFreeLoss(decoder)(x, mean, log_var)
    (first,) = torch.autograd.grad(loss, mean, create_graph=True)
    with pytest.raises(RuntimeError, match='give reduction="none"'):
        torch.autograd.grad(first.square().sum(), mean)

    def second():
        each = sf.SamplingFreeLoss(decoder, reduction="none", chunk_size=2)(x, mean, log_var)
        (grad,) = torch.autograd.grad(each.sum(), mean, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [mean, log_var, *decoder.parameters()])

    ours = second()
    monkeypatch.setattr(queries, "prepare", lambda _: None)
    close(ours, second())


def test_several_cotangents_of_a_total_at_once():
    decoder = build("residual")
    x, mean, log_var = batch(decoder)
    loss = sf.SamplingFreeLoss(decoder)(x, mean, log_var)
    leaves = [mean, log_var, *decoder.parameters()]
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    upstream = torch.tensor([1.0, -2.0], dtype=loss.dtype)
    both = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True)
    for each, pair in zip(once, both, strict=True):
        assert torch.equal(pair, torch.stack([each, -2 * each]))


def test_nothing_is_differentiated_without_need():
    decoder = build("higgins").requires_grad_(False)
    tensors = batch(decoder)
    mean = tensors[1].detach().requires_grad_()
    loss = sf.SamplingFreeLoss(decoder)
    loss(tensors[0].detach(), mean, tensors[2].detach()).backward()
    assert mean.grad is not None and all(p.grad is None for p in decoder.parameters())
    with torch.no_grad():
        assert not loss(*tensors).requires_grad


# What the loss differentiates by autograd, and why.
RECOMPUTED = {
    "huber": "huber_loss has no rule",
    "conv2d_same_even": "conv2d has no adjoint in decoder.layers[0]",
}


@pytest.mark.parametrize("name", RECOMPUTED)
@pytest.mark.filterwarnings("ignore:.*has no tangent rule")
def test_a_decoder_without_adjoints_takes_the_other_path(name):
    torch.manual_seed(0)
    decoder = CASES[name]()
    tensors = batch(decoder, 3)
    assert not is_swept(decoder, tensors)
    report = sf.check_decoder(decoder, tensors[1])
    assert report.obstacles == (RECOMPUTED[name],) and f"loss: {RECOMPUTED[name]}" in str(report)
    ours = gradients(decoder, tensors, chunk_size=2)
    close(ours, gradients(decoder, tensors, backend="reference"))


def test_every_rule_has_an_adjoint():
    assert [r.name for r in RULES.values() if r.adjoint is None and not r.composed] == []


def test_autocast_does_not_round_the_total():
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 200))
    x, mean, log_var = torch.rand(32, 200), torch.randn(32, 4), torch.randn(32, 4) - 1
    with torch.autocast("cpu", torch.bfloat16):
        loss = sf.SamplingFreeLoss(decoder, reduction="sum")
        total, terms = loss(x, mean, log_var, return_terms=True)
    assert torch.allclose(total.detach(), -terms.elbo.sum(), rtol=1e-6)


def test_autocast_keeps_no_cast_that_the_loss_has_made():
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    x, mean, log_var = torch.rand(3, 8), torch.randn(3, 4), torch.randn(3, 4)
    parameters, found = list(decoder.parameters()), []
    for loss_first in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            if loss_first:
                sf.SamplingFreeLoss(decoder)(x, mean, log_var)
            mine = decoder(mean).square().sum()
        found.append(torch.autograd.grad(mine, parameters, allow_unused=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", [name for name in CASES if name not in RECOMPUTED])
def test_every_adjoint_equals_autograd_on_the_rule(name, monkeypatch):
    torch.manual_seed(0)
    decoder = CASES[name]()
    tensors = batch(decoder, 3)
    assert is_swept(decoder, tensors)
    ours = gradients(decoder, tensors, reduction="none")
    close(ours, recomputed(monkeypatch, decoder, tensors, reduction="none"))
