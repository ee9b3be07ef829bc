"""The plan around the rules: caching, chunks, inputs, precision, errors."""

from __future__ import annotations

import copy
import functools
import gc
import types
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastsfvae.jacobian.run.cache as engine
from fastsfvae.gram.pullback import pullback
from fastsfvae.jacobian.api import decode_with_jacobian
from tests.jacobian.test_rules import compare

M = 3


class Mlp(nn.Module):
    """Small, with a plain attribute and optional inputs."""

    def __init__(self, m=M, scale=1.0):
        super().__init__()
        self.first, self.second = nn.Linear(m, 8), nn.Linear(8, 5)
        self.scale = scale
        self.options = types.SimpleNamespace(power=1)

    def forward(self, z, label=None, *, shift=None):
        h = torch.tanh(self.first(z)) ** self.options.power
        if label is not None:
            h = h * (1 + F.one_hot(label, 8).to(h.dtype))
        if shift is not None:
            h = h + shift
        return self.second(h) * self.scale

    def decode(self, z):
        return self.forward(z).square()


class Blocks(nn.Module):
    """A bit of everything in one decoder."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(M, 32)
        self.norm = nn.GroupNorm(2, 8)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)])
        self.up = nn.Upsample(scale_factor=2)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.after = nn.LayerNorm(8)
        self.out = nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(8, 2, 4, 2, 1))

    def forward(self, z):
        h = self.norm(self.fc(z).view(len(z), 8, 2, 2))
        for block in self.blocks:
            h = h + block(F.silu(h))
        tokens = h.flatten(2).transpose(1, 2)
        tokens = self.after(tokens + self.attend(tokens, tokens, tokens, need_weights=False)[0])
        h = tokens.transpose(1, 2).reshape(h.shape)
        return torch.sigmoid(self.out(self.up(h)))


def mlp(**options):
    torch.manual_seed(3)
    return Mlp(**options).double()


def latents(batch=4, m=M, dtype=torch.float64):
    return torch.randn(batch, m, dtype=dtype, generator=torch.Generator().manual_seed(batch))


def test_many_layers_and_batch_sizes():
    torch.manual_seed(0)
    module = Blocks().double()
    for batch in (5, 1, 2, 5):
        compare(module, latents(batch))


def test_transformer_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(M, 1, 8, activation="gelu", batch_first=True).eval()
    module = nn.Sequential(nn.Linear(M, 4 * M), nn.Unflatten(1, (4, M)), layer).double()
    compare(module, latents())
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        ours = decode_with_jacobian(module, latents())
    theirs = decode_with_jacobian(module, latents(), backend="reference")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_one_plan_serves_batch_sizes(monkeypatch):
    module, traced = mlp(), []
    trace = engine.Linearizer._trace
    monkeypatch.setattr(
        engine.Linearizer, "_trace", lambda self, b: traced.append(b) or trace(self, b)
    )
    for batch in (4, 9, 2, 1, 7, 1):
        compare(module, latents(batch))
    assert traced == [4]


class BakesBatch(nn.Linear):
    def forward(self, z):
        size = len(z)
        h = super().forward(z).reshape(size, -1)
        return h * 2 if size > 5 else h


def test_plans_that_hold_for_one_batch_size():
    module = BakesBatch(M, 4).double()
    for batch in (4, 7, 4, 1, 6):
        jacobian = decode_with_jacobian(module, latents(batch))[1]
        expected = module.weight.t() * (2 if batch > 5 else 1)
        torch.testing.assert_close(jacobian, expected.expand(batch, M, 4), rtol=0, atol=0)


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_chunks_change_rounding_only(batch):
    torch.manual_seed(0)
    module, z = Blocks().double(), latents(batch).requires_grad_()
    x = torch.rand(batch, 2, 8, 8, dtype=torch.float64)
    results = []
    for size in (None, 1, 3):
        got = [*decode_with_jacobian(module, z, chunk_size=size)]
        got += [*pullback(module, z, x, chunk_size=size)]
        loss = sum((t.square().sum() + t.sin().sum()) for t in got)
        results.append((*got, *torch.autograd.grad(loss, [z, *module.parameters()])))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("channels_last", [False, True])
def test_pullback(channels_last):
    torch.manual_seed(0)
    module, z = Blocks().double(), latents()
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64)
    output, jacobian = decode_with_jacobian(module, z, backend="reference")
    J, r = jacobian.flatten(2), (x - output).flatten(1)
    expected = (output, J @ J.mT, (J @ r[..., None])[..., 0], r.square().sum(1))
    cotangents = [torch.randn_like(t) for t in expected]
    with sdpa_kernel(SDPBackend.MATH):
        oracle = torch.autograd.grad(
            sum(
                (a * b).sum()
                for a, b in zip(_pullback_reference(module, z, x), cotangents, strict=True)
            ),
            list(module.parameters()),
        )
    for size in (None, 2):
        got = pullback(module, z, x, chunk_size=size)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        loss = sum((a * b).sum() for a, b in zip(got, cotangents, strict=True))
        for a, b in zip(torch.autograd.grad(loss, list(module.parameters())), oracle, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    alone = pullback(module, z)
    assert alone.projection is None and alone.squared_error is None
    torch.testing.assert_close(alone.gram, expected[1])


def _pullback_reference(module, z, x):
    output, jacobian = decode_with_jacobian(module, z, backend="reference")
    J, r = jacobian.flatten(2), (x - output).flatten(1)
    return output, J @ J.mT, (J @ r[..., None])[..., 0], r.square().sum(1)


def _set(module, name, value):
    owner, _, last = name.rpartition(".")
    for part in filter(None, owner.split(".")):
        module = getattr(module, part)
    setattr(module, last, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: _set(d, "scale", 2.5),
        lambda d: _set(d, "options.power", 3),
        lambda d: _set(d, "first", nn.Linear(M, 8).double()),
        lambda d: _set(d, "first.weight", nn.Parameter(torch.randn(8, M, dtype=torch.float64))),
        lambda d: _set(d, "second", nn.Sequential(d.second, nn.Tanh())),
        lambda d: d.second.register_forward_hook(lambda mod, args, out: out.sin()),
        lambda d: d.first.weight.data.mul_(2),
        lambda d: d.first.weight.requires_grad_(False),
        lambda d: _set(d, "scale", torch.tensor(3.0, dtype=torch.float64)),
        lambda d: _set(d, "first.forward", lambda z: 2 * F.linear(z, d.first.weight)),
        lambda d: nn.utils.parametrizations.weight_norm(d.second),
    ],
)
def test_no_change_leaves_a_stale_plan(change):
    module, z = mlp(), latents()
    decode_with_jacobian(module, z)
    change(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = decode_with_jacobian(module, z)
    theirs = decode_with_jacobian(module, z, backend="reference")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_constant_tensor_attribute_changed_in_place():
    module, z = mlp(scale=torch.tensor(2.0, dtype=torch.float64)), latents()
    before = decode_with_jacobian(module, z)[1]
    module.scale.mul_(2)
    torch.testing.assert_close(decode_with_jacobian(module, z)[1], 2 * before)


def test_train_and_eval_make_two_plans():
    module = nn.Sequential(nn.Linear(M, 4), nn.Dropout(0.5)).double().eval()
    compare(module, latents())
    module.train()
    with pytest.raises(RuntimeError, match=r"decoder\[1\] draws at random.*decoder\[1\]\.eval\(\)"):
        decode_with_jacobian(module, latents())
    module.eval()
    compare(module, latents())


def test_frozen_parameters_and_inputs():
    module = mlp()
    module.first.requires_grad_(False)
    z = latents().requires_grad_()
    J = decode_with_jacobian(module, z)[1]
    J.square().sum().backward()
    assert module.first.weight.grad is None and z.grad is not None
    module.requires_grad_(False)
    assert not decode_with_jacobian(module, latents())[1].requires_grad


def test_gradients_reach_functional_parameters():
    module, z = mlp(), latents()
    fresh = {name: torch.randn_like(p).requires_grad_() for name, p in module.named_parameters()}

    class Loss(nn.Module):
        def __init__(self, decoder):
            super().__init__()
            self.decoder = decoder

        def forward(self, z, backend):
            return decode_with_jacobian(self.decoder, z, backend=backend)[1].square().sum()

    decode_with_jacobian(module, z)
    named = {f"decoder.{name}": p for name, p in fresh.items()}
    ours, theirs = (
        torch.autograd.grad(
            torch.func.functional_call(Loss(module), named, (z, backend)),
            list(fresh.values()),
            allow_unused=True,
        )
        for backend in ("torch", "reference")
    )
    for a, b in zip(ours, theirs, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_extra_inputs_follow_their_samples():
    module, z = mlp(), latents(5)
    label = torch.tensor([0, 3, 3, 7, 1])
    shift = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    constant = torch.randn(8, dtype=torch.float64, requires_grad=True)
    for given in (shift, constant):
        results = []
        for options in ({}, {"chunk_size": 2}, {"backend": "reference"}):
            y, J = decode_with_jacobian(module, z, label, shift=given, **options)
            (grad,) = torch.autograd.grad(
                y.sin().sum() + J.square().sum(), given, allow_unused=True
            )
            results.append((y, J, torch.zeros(()) if grad is None else grad))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_callables():
    module, z = mlp(), latents()
    weight = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0, 3, 1, 7])

    def closure(z):
        return module(z) @ weight

    for function in (
        closure,
        module.forward,
        module.decode,
        functools.partial(module, label=label),
    ):
        grads = []
        for backend in ("torch", "reference"):
            y, J = decode_with_jacobian(function, z, backend=backend)
            loss = y.sin().sum() + J.square().sum()
            leaves = [weight, *module.parameters()]
            grads.append((y, J, *torch.autograd.grad(loss, leaves, allow_unused=True)))
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_more_latents_than_outputs_and_odd_strides():
    torch.manual_seed(0)
    module = Mlp(m=11).double()
    compare(module, latents(4, 11))
    compare(module, latents(11, 4).t())
    compare(module, latents(8, 11)[::2])


@pytest.mark.parametrize("build", [mlp, lambda: _Norms().double()])
def test_second_order(build):
    torch.manual_seed(0)
    module, z = build(), latents(2).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def functional(z, *values):
        parameters = dict(zip(names, values, strict=True))

        def run(z):
            return decode_with_jacobian(module, z)

        originals = {name: p for name, p in module.named_parameters()}
        _swap(module, parameters)
        try:
            return run(z)
        finally:
            _swap(module, originals)

    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(functional, (z, *values))
    assert torch.autograd.gradgradcheck(functional, (z, *values))


def _swap(module, values):
    for name, value in values.items():
        owner = module.get_submodule(name.rpartition(".")[0])
        owner._parameters[name.rpartition(".")[2]] = value


class _Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(M, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, z):
        return self.last(F.gelu(self.norm(self.first(z))))


def test_autocast():
    torch.manual_seed(0)
    module, z = Blocks().float(), latents(4, dtype=torch.float32)
    exact = decode_with_jacobian(copy.deepcopy(module).double(), z.double(), backend="reference")
    plain = decode_with_jacobian(module, z)[1]
    with torch.autocast("cpu", torch.bfloat16):
        ours = decode_with_jacobian(module, z)
        theirs = decode_with_jacobian(module, z, backend="reference")
    assert ours[1].dtype == torch.bfloat16
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        scale = truth.abs().max()
        error, allowed = (a - truth).abs().max(), (b - truth).abs().max()
        assert error <= 2 * allowed + 4 * torch.finfo(torch.bfloat16).eps * scale
    assert torch.equal(decode_with_jacobian(module, z)[1], plain)


def test_plans_die_with_their_decoder():
    module = mlp()
    decode_with_jacobian(module, latents())
    reference = weakref.ref(module)
    del module
    gc.collect()
    assert reference() is None


def test_tracing_leaves_the_decoder_as_it_was():
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(M, 4).double())
    before = layer.weight
    decode_with_jacobian(layer, latents())
    assert layer.weight is before
    copy.deepcopy(nn.Sequential(mlp()))


def test_function_transforms():
    """Traced and run inside torch.func.grad and vmap."""
    module, z = mlp(), latents()
    values = dict(module.named_parameters())

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = module

        def forward(self, z):
            return decode_with_jacobian(self.decoder, z)[1].square().sum()

    def norm(values):
        named = {f"decoder.{name}": value for name, value in values.items()}
        return torch.func.functional_call(Norm(), named, (z,))

    ours = torch.func.grad(norm)(values)
    jacobian = decode_with_jacobian(module, z, backend="reference")[1]
    leaves = list(values.values())
    theirs = torch.autograd.grad(
        jacobian.square().sum(), leaves, materialize_grads=True, allow_unused=True
    )
    for a, b in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    stacked = torch.stack([z, 2 * z])
    fresh = mlp()
    mapped = torch.func.vmap(lambda z: decode_with_jacobian(fresh, z)[1])(stacked)
    for got, z in zip(mapped, stacked, strict=True):
        torch.testing.assert_close(got, decode_with_jacobian(module, z)[1])


def test_inference_mode():
    module, z = mlp(), latents()
    with torch.inference_mode():
        ours = decode_with_jacobian(module, z)
    theirs = decode_with_jacobian(module, z, backend="reference")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    compare(module, z)


def test_spectral_norm_in_training_steps_as_a_call_does():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(M, 5).double())
    twin = copy.deepcopy(layer)
    for _ in range(3):
        output = decode_with_jacobian(layer, latents(), chunk_size=2)[0]
        torch.testing.assert_close(output, twin(latents()), rtol=1e-12, atol=1e-12)


def test_source_is_readable_python():
    linearizer = engine.Linearizer(mlp(), latents())
    lines = linearizer.plan(4).source.splitlines()
    assert "def body(z, tensors, extras, statics, sides):" in lines
    assert any("tanh_rule(" in line for line in lines)
