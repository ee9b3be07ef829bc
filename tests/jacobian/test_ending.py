"""The loss of decoders whose last layer is taken with the Gram: what runs, and every gradient."""

from functools import partial

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae.jacobian.run.cache import Linearizer
from fastsfvae.kernels import _gram_tail_weight, gram_project, gram_tail, gram_tail_backward
from fastsfvae.ops import _gpu, dispatch
from fastsfvae.ops.dispatch import layer_key
from tests._triton import DEVICE, requires_triton

pytestmark = requires_triton
M, B = 3, 3
LIKELIHOODS = ("precision", "mixture", "normalized", "expected")


class Tied(nn.Module):
    """One weight twice: the last layer's gradient is added to another one's."""

    def __init__(self):
        super().__init__()
        self.lift, self.layer = nn.Linear(M, 16), nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1)

    def forward(self, z):
        h = torch.relu(self.lift(z)).view(-1, 4, 2, 2)
        return self.layer(torch.tanh(self.layer(h)))


def decoder(name="relu"):
    torch.manual_seed(0)
    if name == "tied":
        return Tied()
    phi = {"silu": nn.SiLU, "sigmoid": nn.ReLU}.get(name, nn.ReLU)
    layers = [nn.Linear(M, 8), nn.ReLU(), nn.Unflatten(1, (8, 1, 1)), nn.ConvTranspose2d(8, 6, 2)]
    layers += [phi(), nn.ConvTranspose2d(6, 5, 4, stride=2, padding=1), phi()]
    layers += [nn.ConvTranspose2d(5, 3, 4, stride=2, padding=1, bias=name != "silu")]
    layers += [nn.Sigmoid()] * (name in ("sigmoid", "silu")) + [nn.Flatten()] * (name == "flat")
    return nn.Sequential(*layers)


def tensors(module, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        shape = module(torch.zeros(B, M, device=DEVICE, dtype=dtype)).shape
    drawn = (torch.randn(s, generator=g, dtype=torch.float64) for s in (shape, (B, M), (B, M)))
    x, mean, log_var = (t.to(DEVICE, dtype) for t in drawn)
    return [t.requires_grad_() for t in (x, mean, log_var - 1)]


def gradients(module, inputs, backend, reduction="sum", **settings):
    """The loss of weighted samples and its gradients in data, latents, c, gamma and parameters."""
    c, gamma = (torch.tensor(v, device=DEVICE, dtype=inputs[0].dtype) for v in (0.3, 0.6))
    leaves = [*inputs, c.requires_grad_(), gamma.requires_grad_()]
    leaves += [p for p in module.parameters() if p.requires_grad]
    loss = sf.SamplingFreeLoss(
        module, noise_var=c, gamma=gamma, reduction=reduction, backend=backend, **settings
    )
    weight = torch.linspace(0.5, 2, B, device=DEVICE, dtype=inputs[0].dtype)
    value = loss(*inputs, sample_weight=weight).sum()
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return [value.detach(), *grads]


@pytest.fixture
def launches(monkeypatch):
    seen = []

    def spy(name, original, *args, **kwargs):
        # A rescue finds no lost sample here.
        if kwargs.get("lost") is None:
            seen.append(name)
        return original(*args, **kwargs)

    for module, name in (
        (gram_tail, "gram_tail_partials"),
        (gram_tail_backward, "gram_tail_bwd"),
        (gram_project, "gram_project_partials"),
        (gram_project, "gram_project_bwd"),
    ):
        monkeypatch.setattr(module, name, partial(spy, name, getattr(module, name)))
    return seen


TAIL = ["gram_tail_partials", "gram_tail_bwd"]


def check(name, launches, rounds=1, **settings):
    module = decoder(name).to(DEVICE)
    with sf.fused_layers("always"):
        ours = gradients(module, tensors(module), "triton", **settings)
    assert launches == rounds * TAIL
    settings.pop("chunk_size", None)
    plain = gradients(module, tensors(module), "reference", **settings)
    exact = decoder(name).to(DEVICE).double()
    want = gradients(exact, tensors(exact, torch.float64), "reference", **settings)
    eps = torch.finfo(torch.float32).eps
    scale = max(truth.abs().max() for truth in want[1:])
    for mine, peer, truth in zip(ours, plain, want, strict=True):
        bound = 2 * (peer - truth).abs().max() + 16 * eps * max(scale, truth.abs().max())
        assert (mine - truth).abs().max() <= bound


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", ["relu", "sigmoid"])
def test_every_likelihood(name, likelihood, launches):
    check(name, launches, likelihood=likelihood)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["silu", "tied"])
def test_other_endings_in_several_chunks(name, launches):
    check(name, launches, rounds=2, chunk_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size, rounds", [(None, 1), (2, -(-B // 2))])
def test_gradients_that_are_asked_for_later(launches, chunk_size, rounds):
    module = decoder().to(DEVICE)
    with sf.fused_layers("always"):
        ours = gradients(module, tensors(module), "triton", "none", chunk_size=chunk_size)
    # The tangents of one chunk are kept; those of several are made again.
    assert launches == (rounds * TAIL[:1] + rounds * TAIL if rounds > 1 else TAIL)
    for mine, want in zip(ours, gradients(module, tensors(module), "torch", "none"), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name, chunk_size", [("relu", None), ("relu", 2), ("silu", 2)])
def test_the_pullback(launches, name, chunk_size, given):
    module = decoder(name).to(DEVICE)
    x, z, _ = tensors(module)
    leaves = [z, *(p for p in module.parameters() if p.requires_grad), *([x] if given else [])]

    def results(backend):
        found = [
            *sf.pullback(module, z, x if given else None, backend=backend, chunk_size=chunk_size)
        ]
        found = [t for t in found if t is not None]
        g = torch.Generator().manual_seed(2)
        drawn = [torch.randn(t.shape, generator=g).to(t) for t in found]
        total = sum((a * b).sum() for a, b in zip(found, drawn, strict=True))
        grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return [*(t.detach() for t in found), *grads]

    with sf.fused_layers("always"):
        ours = results("triton")
    assert set(launches) == set(TAIL)
    for mine, want in zip(ours, results("torch"), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["weight", "bias", "weight and bias"])
def test_only_the_last_layers_gradient(trained, launches):
    module = decoder().to(DEVICE).requires_grad_(False)
    last = [getattr(module[-1], name).requires_grad_() for name in trained.split(" and ")]
    inputs = [t.detach() for t in tensors(module)]
    found = []
    for backend in ("triton", "torch"):
        with sf.fused_layers("always"):
            loss = sf.SamplingFreeLoss(module, backend=backend)(*inputs)
        found.append(torch.autograd.grad(loss, last))
    assert launches == TAIL
    for mine, want in zip(*found, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_last_layer_that_is_not_trained(chunk_size, monkeypatch):
    module, seen = decoder().to(DEVICE), []
    leave = _gram_tail_weight.leave_values
    monkeypatch.setattr(
        _gram_tail_weight, "leave_values", lambda *given: seen.append(given) or leave(*given)
    )
    kept, found = list(module[:-1].parameters()), []
    inputs = tensors(module)
    for trained in (True, False):
        module[-1].requires_grad_(trained)
        with sf.fused_layers("always"):
            settings = {"backend": "triton", "reduction": "sum", "chunk_size": chunk_size}
            loss = sf.SamplingFreeLoss(module, **settings)(*inputs)
        leaves = [t for t in (*inputs, *kept) if t.requires_grad]
        found.append(torch.autograd.grad(loss, leaves))
        # The second time nothing came.
        assert len(seen) == (-(-B // chunk_size) if chunk_size else 1)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("name, setting", [("relu", "never"), ("flat", "always")])
def test_where_the_jacobian_is_written(name, setting, launches):
    module = decoder(name).to(DEVICE)
    with sf.fused_layers(setting):
        gradients(module, tensors(module), "triton")
    assert launches == ["gram_project_partials", "gram_project_bwd"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu", "sigmoid", "flat"])
@pytest.mark.parametrize("with_gram, alone", [("fused", "library"), ("library", "fused")])
def test_what_was_measured_with_the_gram_decides(name, with_gram, alone, launches, monkeypatch):
    card = _gpu.Gpu("a card", 89, 1e11, 1e12)
    sizes = "conv_transpose2d", (5, 4, 4), (5, 3, 4, 4), "ieee"
    table = {layer_key(*sizes, of_gram=True): with_gram, layer_key(*sizes): alone}
    monkeypatch.setitem(_gpu.MEASURED, "a card", {"float32": "ieee", "layers": table})
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: card)
    module = decoder(name).to(DEVICE)
    gradients(module, tensors(module), "triton")
    # With a view behind it, it is not taken with its Gram, however it runs.
    fused = with_gram == "fused" and name != "flat"
    assert launches == (TAIL if fused else ["gram_project_partials", "gram_project_bwd"])
    plan = Linearizer(module, tensors(module)[1].detach(), (), {}, "triton").plan(B)
    last = [step.choice for step in plan.steps if step.op == "conv_transpose2d"][-1]
    assert last.how == (alone if name == "flat" else with_gram)


@pytest.mark.parametrize("name, told", [("sigmoid", True), ("flat", False)])
def test_a_report_tells_of_it(name, told):
    module = decoder(name).to(DEVICE)
    with sf.fused_layers("always"):
        plan = Linearizer(module, tensors(module)[1].detach(), (), {}, "triton").plan(B)
    notes = [step.choice.why for step in plan.steps if step.choice is not None]
    assert ("the loss takes its Gram at once and writes no J" in notes[-1]) == told
    assert not any("writes no J" in note for note in notes[:-1])


def test_the_jacobian_itself_is_there_for_those_who_ask(launches):
    module = decoder().to(DEVICE)
    z = tensors(module)[1].detach()
    with sf.fused_layers("always"):
        ours = sf.decode_with_jacobian(module, z, backend="triton")
    for mine, want in zip(ours, sf.decode_with_jacobian(module, z, backend="torch"), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-6)
    assert launches == []


@pytest.mark.slow
def test_autocast(launches):
    module = decoder("sigmoid").to(DEVICE)
    with sf.fused_layers("always"), torch.autocast(DEVICE, torch.bfloat16):
        ours = gradients(module, tensors(module), "triton")
    assert launches == TAIL
    with torch.autocast(DEVICE, torch.bfloat16):
        plain = gradients(module, tensors(module), "torch")
    want = gradients(module, tensors(module), "torch")
    for mine, peer, truth in zip(ours, plain, want, strict=True):
        # Roundings to bfloat16 of values, tangents and gradients in each of five layers.
        bound = 2 * (peer - truth).abs().max() + 10 * 2.0**-8 * truth.abs().max()
        assert mine.dtype == truth.dtype and (mine - truth).abs().max() <= bound


@pytest.mark.slow
def test_two_runs_give_the_same_bits():
    module = decoder("silu").to(DEVICE)
    with sf.fused_layers("always"):
        runs = [gradients(module, tensors(module), "triton", chunk_size=2) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
