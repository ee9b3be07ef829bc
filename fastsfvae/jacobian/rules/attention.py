"""Scaled dot-product attention, composed from the rules of its parts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.arithmetic import add, mul
from fastsfvae.jacobian.rules.arrange import repeat_interleave
from fastsfvae.jacobian.rules.jet import Jet, primal_of
from fastsfvae.jacobian.rules.linear import matmul
from fastsfvae.jacobian.rules.registry import rule
from fastsfvae.jacobian.rules.shape import transpose
from fastsfvae.jacobian.rules.softmax import softmax


def _all_jets(args: tuple, kwargs: dict) -> bool:
    # A parameter in place of one of them would meet plain arithmetic, which no adjoint sees.
    mask = args[3] if len(args) > 3 else None
    trained = isinstance(mask, Jet) or (isinstance(mask, Tensor) and mask.requires_grad)
    return all(isinstance(x, Jet) for x in args[:3]) and not trained


@rule("scaled_dot_product_attention", several=True, composed=True, covers=_all_jets)
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Jet:
    """softmax(Q K^T * scale + mask) V; PyTorch's own has no usable forward derivative."""
    width = primal_of(query).shape[-1]
    if enable_gqa:
        heads = primal_of(query).shape[-3]
        key, value = _repeated(key, heads), _repeated(value, heads)
    flipped = transpose(key, -2, -1) if isinstance(key, Jet) else key.transpose(-2, -1)
    factor = 1 / math.sqrt(width) if scale is None else scale
    scores = _times(_product(query, flipped), factor)
    if is_causal:
        shape = primal_of(scores).shape[-2:]
        attn_mask = torch.ones(shape, dtype=torch.bool, device=primal_of(query).device).tril()
    if attn_mask is not None:
        scores = _plus(scores, _additive(attn_mask, primal_of(scores)))
    return matmul(_softmax(scores), value)


def _repeated(x: Any, heads: int) -> Any:
    times = heads // primal_of(x).shape[-3]
    if isinstance(x, Jet):
        return repeat_interleave(x, times, -3)
    return x.repeat_interleave(times, -3)


def _additive(mask: Any, scores: Tensor) -> Any:
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -math.inf)
    return mask


def _product(a: Any, b: Any) -> Any:
    return matmul(a, b) if isinstance(a, Jet) or isinstance(b, Jet) else torch.matmul(a, b)


def _times(x: Any, factor: float) -> Any:
    return mul(x, factor) if isinstance(x, Jet) else x * factor


def _plus(a: Any, b: Any) -> Any:
    return add(a, b) if isinstance(a, Jet) or isinstance(b, Jet) else a + b


def _softmax(x: Any) -> Any:
    return softmax(x, -1) if isinstance(x, Jet) else torch.softmax(x, -1)
