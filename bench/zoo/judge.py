"""What is asked of each decoder: right, refused in one line, or neither; and how fast.

The oracle is plain reverse mode, one output after the other without vmap, whose batching PyTorch
gets wrong for some operations; its log-density is torch.distributions'. Where it disagrees, finite
differences of its loss, a function of first derivatives alone, decide who is right.
"""

from __future__ import annotations

import contextlib
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastsfvae as sf
from bench.peers import DECODER_LOSSES, OURS, with_torch_distributions
from bench.timing import quantiles, take_turns
from bench.zoo.entry import M
from fastsfvae.jacobian.run.cache import Linearizer

B = 3
TOLERANCE = 1e-10
JACFWD = "vmap(jacfwd)"
PACKAGE = str(Path(sf.__file__).parent)


def by_rows(decoder: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Z -> (output, J [B, m, n]), a backward pass for each output."""

    def jacobian(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            inputs = z if z.requires_grad else z.clone().requires_grad_()
            output = decoder(inputs)
            rows = [
                torch.autograd.grad(column.sum(), inputs, create_graph=True)[0]
                for column in output.flatten(1).unbind(1)
            ]
        return output, torch.stack(rows, -1)

    return jacobian


def evaluate(loss: Callable, problem: tuple, leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients."""
    value = loss(*problem)
    options = {"allow_unused": True, "materialize_grads": True}
    return value.detach(), list(torch.autograd.grad(value, leaves, **options))


def judge(make: Callable[[], nn.Module]) -> dict[str, Any]:
    """Everything that the table says of a decoder."""
    torch.manual_seed(0)
    with no_single_precision():
        made = make()
    decoder = InDouble(made).eval()
    settle(decoder)
    z = torch.randn(B, M, dtype=torch.float64)
    with torch.no_grad():
        x = decoder(z) + 0.3 * torch.randn_like(decoder(z))
    mean, log_var = z.clone().requires_grad_(), (0.3 * torch.randn_like(z) - 1).requires_grad_()
    problem = (x, mean, log_var)
    leaves = [mean, log_var, *(p for p in decoder.parameters() if p.requires_grad)]
    found: dict[str, Any] = {"outputs": x[0].numel()}
    loss = DECODER_LOSSES[OURS](decoder)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            value, gradients = evaluate(loss, problem, leaves)
    except Exception as error:
        return found | {"outcome": kind_of(error), "why": describe(error)}
    found["first"] = time.perf_counter() - start
    with torch.no_grad():
        obstacles = Linearizer(decoder, z).plan(B).obstacles
    found["slower"] = sorted(set(obstacles))
    found["said"] = sorted({str(w.message).split("\n")[0] for w in said if is_ours(w)})
    with sdpa_kernel(SDPBackend.MATH):
        oracle = with_torch_distributions(by_rows, decoder)
        try:
            want, exact = evaluate(oracle, problem, leaves)
        except RuntimeError as error:
            return found | {"outcome": "no oracle", "why": describe(error)}
        found |= compare(value, gradients, want, exact)
        if found["outcome"] == "wrong":
            found["why"] = arbitrate(oracle, problem, leaves, gradients, exact)
    candidates = {OURS: lambda: evaluate(loss, problem, leaves)}
    peer = DECODER_LOSSES[JACFWD](decoder)
    # PyTorch's fused attention has no forward mode either.
    with sdpa_kernel(SDPBackend.MATH):
        try:
            evaluate(peer, problem, leaves)
            candidates[JACFWD] = lambda: evaluate(peer, problem, leaves)
        except Exception as error:
            found["peer"] = describe(error)
        samples = take_turns(candidates, rounds=3, warmup=1)
    found["step"] = quantiles(samples[OURS]).p50
    if JACFWD in samples:
        found["ratio"] = quantiles(samples[JACFWD]).p50 / found["step"]
    return found


@contextlib.contextmanager
def no_single_precision() -> Iterator[None]:
    """Let what asks for single precision have double precision."""
    names = mock.patch.multiple(torch, float32=torch.float64, float=torch.float64)
    with names, mock.patch.object(Tensor, "float", Tensor.double):
        yield


class InDouble(nn.Module):
    """A decoder in double precision throughout, also where it asks for single precision.

    Normalisations and softmaxes of many packages do; rounding there would hide what is wrong.
    """

    def __init__(self, decoder: nn.Module):
        super().__init__()
        for tensor in (*decoder.parameters(), *decoder.buffers()):
            if tensor.is_complex():
                tensor.data = tensor.data.to(torch.complex128)
        self.decoder = decoder.double()

    def forward(self, z: Tensor) -> Tensor:
        """[B, M] -> [B, *out]."""
        double = {"float32": torch.float64, "float": torch.float64}
        with (
            mock.patch.multiple(torch, **double),
            mock.patch.object(Tensor, "float", Tensor.double),
        ):
            return self.decoder(z)


def settle(decoder: nn.Module) -> None:
    """Statistics and weights as after some training: no layer starts at zero or at rest."""
    for module in decoder.modules():
        mean, var = (getattr(module, f"running_{name}", None) for name in ("mean", "var"))
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            mean.normal_()
            var.uniform_(0.5, 2)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.1)


def compare(value, gradients, want, exact) -> dict[str, Any]:
    """Whether both agree, to the tolerance times the largest gradient."""
    if not all(torch.isfinite(g).all() for g in exact):
        return {"outcome": "no oracle", "why": "reverse mode's gradients are not finite"}
    scale = max(float(g.abs().max()) for g in exact if g.numel())
    pairs = zip(gradients, exact, strict=True)
    error = max(float((a - b).abs().max()) for a, b in pairs if a.numel()) / scale
    off = abs(float(value - want)) / max(1.0, abs(float(want)))
    right = error <= TOLERANCE and off <= TOLERANCE
    return {"outcome": "right" if right else "wrong", "error": error, "loss_error": off}


def arbitrate(oracle, problem, leaves, gradients, exact) -> str:
    """Who of the two agrees with finite differences along the direction in which they differ."""
    direction = [a - b for a, b in zip(gradients, exact, strict=True)]
    size = sum(float(d.square().sum()) for d in direction) ** 0.5
    if size == 0:
        return "the losses differ"
    values, step = [], 1e-5
    for sign in (1, -1):
        with torch.no_grad():
            for leaf, d in zip(leaves, direction, strict=True):
                leaf += sign * step / size * d
        values.append(float(oracle(*problem).detach()))
        with torch.no_grad():
            for leaf, d in zip(leaves, direction, strict=True):
                leaf -= sign * step / size * d
    slope = (values[0] - values[1]) / (2 * step)
    along = [
        sum(float((g * d).sum()) for g, d in zip(of, direction, strict=True)) / size
        for of in (gradients, exact)
    ]
    return (
        f"along the difference: ours {along[0]:.6e}, reverse mode {along[1]:.6e}, "
        f"finite differences {slope:.6e}"
    )


def innermost(error: BaseException) -> str:
    """The file that raised."""
    return traceback.extract_tb(error.__traceback__)[-1].filename


def kind_of(error: BaseException) -> str:
    """A refusal is one line of this library's own."""
    ours = innermost(error).startswith(PACKAGE) and isinstance(
        error, (RuntimeError, TypeError, ValueError)
    )
    return "refused" if ours and "\n" not in str(error) else "raw error"


def describe(error: BaseException) -> str:
    """Its first line, with its type where this library did not raise it."""
    # Where packages are installed is nobody's business.
    line = re.sub(r"\S*/site-packages/", "", str(error).strip().split("\n")[0])[:300]
    return line if innermost(error).startswith(PACKAGE) else f"{type(error).__name__}: {line}"


def is_ours(warning: warnings.WarningMessage) -> bool:
    """Whether a warning is this library's."""
    return "tangent rule" in str(warning.message) or warning.filename.startswith(PACKAGE)
