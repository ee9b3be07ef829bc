"""What launchers accept and allocate. No Triton here: the fakes of the operators do without it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The largest m whose factorisation fits the registers of one program.
WOODBURY_MAX_M = 64
# The most tangents, and channels out, that the program of a last layer taken with its Gram holds.
GRAM_TAIL_MAX_M = 64
GRAM_TAIL_MAX_CHANNELS = 4


def asked_for(variable: str) -> bool | None:
    """What an environment variable turns on or off; None where it is not set.

    Raises:
        ValueError: it is set to something else than 0 or 1.
    """
    setting = os.environ.get(variable)
    if setting not in (None, "0", "1"):
        raise ValueError(f"{variable}={setting} is not one of 0, 1")
    return None if setting is None else setting == "1"


class Woodbury(NamedTuple):
    """What one factorisation gives; all that the adjoints need is m x m or smaller.

    Attributes:
        log_det: logdet(I + A/c), ``[B]``.
        explained: v^T C^-1 v clamped to [0, rr], ``[B]``.
        K: S C^-1 S, ``[B, m, m]``.
        y: S C^-1 v, ``[B, m]``.
        q: diag(A C^-1), ``[B, m]``.
        w: C^-1 v, ``[B, m]``.
        lost: bool ``[B]``, True where a pivot was floored, kept fewer than half of its digits or is
            not finite.
    """

    log_det: Tensor
    explained: Tensor
    K: Tensor
    y: Tensor
    q: Tensor
    w: Tensor
    lost: Tensor


# The activations and their parameters, in the order in which `params` gives them.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "relu": (),
    "leaky_relu": ("negative_slope",),
    "elu": ("alpha",),
    "selu": (),
    "silu": (),
    "gelu": (),
    "gelu_tanh": (),
    "tanh": (),
    "sigmoid": (),
    "softplus": ("beta", "threshold"),
    "hardtanh": ("min_val", "max_val"),
}
# Those whose second derivative is 0.
PIECEWISE_LINEAR = frozenset({"relu", "leaky_relu", "hardtanh"})


def reads_result(kind: str, params: Sequence[float]) -> bool:
    """Whether phi' can be read off phi(a), so that phi(a) may take a's place.

    phi(a) > 0 where a > 0 alone, and there is no second derivative. Not so for hardtanh, whose
    bounds may be rounded outwards.
    """
    return kind == "relu" or (kind == "leaky_relu" and params[0] > 0)


def rows_dense(t: Tensor) -> Tensor:
    """Return `t` itself where its last axis has unit stride, else a contiguous copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def memory_format(t: Tensor) -> torch.memory_format:
    """The format in which `t` is dense: contiguous, or channels-last (4-d or 5-d).

    A tensor that is neither gets "contiguous", the format it will be copied to.
    """
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
    if channels_last is None or t.is_contiguous():
        return torch.contiguous_format
    dense = t.is_contiguous(memory_format=channels_last)
    return channels_last if dense else torch.contiguous_format


def tangents_like(T: Tensor, fmt: torch.memory_format) -> Tensor:
    """T ``[m, B, *F]`` with each T[i] dense in `fmt`, copied only where it is not.

    The stride of the leading axis stays free.
    """
    if T[0].is_contiguous(memory_format=fmt):
        return T
    return T.flatten(0, 1).contiguous(memory_format=fmt).unflatten(0, (T.shape[0], T.shape[1]))


def samples_apart(stack: Tensor) -> int | None:
    """Samples between the starts of two slots of ``[S, B, *F]``, at least B.

    None where the samples of a slot are not dense behind one another, or slots are not whole
    samples apart.
    """
    batch, sample = stack.shape[1], stack.shape[2:].numel()
    if not stack[0].is_contiguous():
        return None
    if len(stack) == 1:
        return batch
    apart, rest = divmod(stack.stride(0), sample)
    return apart if rest == 0 and apart >= batch else None


def dense_slots(stack: Tensor) -> Tensor:
    """Return `stack` itself where `samples_apart` has a number for it, else a contiguous copy."""
    return stack if samples_apart(stack) is not None else stack.contiguous()


def room_for(out: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor:
    """Where a stack goes: `out`, or new dense memory where it is None.

    Args:
        out: in the dtype of `like` or in float32; its slots are dense.
        shape: ``(S, B, H, W, C)``.
        like: gives dtype and device.

    Raises:
        ValueError: an `out` of another shape, dtype or order.
    """
    shape = tuple(shape)
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    if out.shape != shape or out.dtype not in (like.dtype, torch.float32):
        raise ValueError(
            f"out {tuple(out.shape)}, {out.dtype}: give {shape}, {like.dtype} or float32"
        )
    if samples_apart(out) is None:
        raise ValueError(f"out has strides {out.stride()}: give slots dense, channels last")
    return out


def empty_tangents(a: Tensor, T: Tensor) -> Tensor:
    """Uninitialised ``[m, *a.shape]`` tangents of T's dtype, each in dense a's memory order."""
    strides = (a.numel(), *a.stride())
    return torch.empty_strided((T.shape[0], *a.shape), strides, dtype=T.dtype, device=T.device)
