"""A number that changes from call to call becomes an input of the plan, where that can be."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsfvae as sf
from fastsfvae.jacobian.api import decode_with_jacobian
from fastsfvae.jacobian.run.cache import Linearizer

B, M = 4, 3
STEPS = (0.5, 0.4, 0.3, 0.7, 0.5)


class Decoder(nn.Module):
    def __init__(self, function, number=0.5):
        super().__init__()
        self.lift, self.function, self.number = nn.Linear(M, 8), function, number
        self.register_buffer("keep", torch.arange(8) % 2 == 0)

    def forward(self, z, k=1.0):
        return self.function(self, self.lift(z), self.number, k).flatten(1)


def decoder(function, number=0.5):
    torch.manual_seed(0)
    return Decoder(function, number).double().eval()


def latents():
    return torch.randn(B, M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


VALUES = {
    "factor": lambda own, h, t, k: h * t,
    "temperature": lambda own, h, t, k: (h / t).softmax(1),
    "inverse": lambda own, h, t, k: h * (1 / t),
    "blend": lambda own, h, t, k: t * h + (1 - t) * h.tanh(),
    "alpha": lambda own, h, t, k: torch.add(h, h.sin(), alpha=t),
    "exponent": lambda own, h, t, k: h.exp() ** t,
    "slope": lambda own, h, t, k: F.leaky_relu(h, t),
    "bounds": lambda own, h, t, k: h.clamp(-t, t),
    "condition": lambda own, h, t, k: torch.where(h.abs() < t, h, h.sign() * t),
    "filled": lambda own, h, t, k: h * torch.full((h.shape[0], 1), t, dtype=h.dtype),
    "further input": lambda own, h, t, k: h / (1 + k),
    "both": lambda own, h, t, k: h * t + k,
    "beside a mask": lambda own, h, t, k: h[:, own.keep] * t,
}
DECIDES = {
    "branch": lambda own, h, t, k: h * t if t > 0.35 else h.sin(),
    "root": lambda own, h, t, k: h * math.sqrt(t),
    "integer": lambda own, h, t, k: h * int(10 * t),
    "epsilon": lambda own, h, t, k: F.layer_norm(h, (8,), eps=t),
    "size": lambda own, h, t, k: h[:, : round(10 * t)].sum(1, keepdim=True),
    "scale": lambda own, h, t, k: F.interpolate(h[:, None], scale_factor=1 + t, mode="linear"),
}


@pytest.fixture
def traced(monkeypatch):
    """Grows with each trace."""
    from fastsfvae.jacobian.plan import trace

    found, original = [], trace.trace

    def counted(*args, **kwargs):
        found.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(trace, "trace", counted)
    return found


def compare(module, numbers):
    for number in numbers:
        module.number = number
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the decoder has been traced")
            ours = decode_with_jacobian(module, latents(), k=number)[1]
        theirs = decode_with_jacobian(module, latents(), k=number, backend="reference")[1]
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# Before 2.14 PyTorch asks for the value of an exponent: right, and traced for each.
EXPONENTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


@pytest.mark.parametrize("name", VALUES)
def test_traced_once_more(name, traced):
    module = decoder(VALUES[name])
    compare(module, STEPS)
    if name == "exponent" and not EXPONENTS:
        return
    assert len(traced) == 2
    assert Linearizer(module, latents(), (), {"k": 0.5}).plan(B).obstacles == []


@pytest.mark.parametrize("name", DECIDES)
def test_where_the_decoder_asks_for_it(name, traced):
    compare(decoder(DECIDES[name]), STEPS)
    # A trace for each value, and one that showed that it had to be so.
    assert len(traced) == len(set(STEPS)) + 1


def test_counters(traced):
    """Integers as well, where they are no sizes."""
    compare(decoder(lambda own, h, t, k: h * t + h.roll(t, 1), 1), (1, 2, 3, 2, 1))
    assert len(traced) == 2


def test_sizes():
    compare(decoder(lambda own, h, t, k: h.view(-1, 8 // t, t).sum(2), 1), (1, 2, 4, 2, 1))


def test_gradients_of_the_loss():
    module, z = decoder(lambda own, h, t, k: (h / t).tanh()), latents().requires_grad_()
    x, log_var = torch.rand(B, 8, dtype=torch.float64), torch.zeros(B, M, dtype=torch.float64)
    for module.number in STEPS:
        ours, theirs = (
            torch.autograd.grad(
                sf.SamplingFreeLoss(module, backend=backend)(x, z, log_var),
                [z, *module.parameters()],
            )
            for backend in ("torch", "reference")
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_a_compiled_loss_follows_a_number():
    module, z = decoder(lambda own, h, t, k: (h / t).tanh()), latents()
    x, log_var = torch.rand(B, 8, dtype=torch.float64), torch.zeros(B, M, dtype=torch.float64)
    loss = sf.SamplingFreeLoss(module)
    compiled = torch.compile(lambda: loss(x, z, log_var), backend="aot_eager", fullgraph=True)
    for module.number in STEPS:
        torch.testing.assert_close(compiled(), loss(x, z, log_var))
