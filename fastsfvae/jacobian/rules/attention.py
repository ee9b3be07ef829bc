"""Scaled dot-product attention, composed from the rules of its parts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.arithmetic import add, mul
from fastsfvae.jacobian.rules.arrange import repeat_interleave
from fastsfvae.jacobian.rules.constant import as_jets
from fastsfvae.jacobian.rules.jet import Jet, primal_of
from fastsfvae.jacobian.rules.linear import einsum, matmul
from fastsfvae.jacobian.rules.registry import always, rule
from fastsfvae.jacobian.rules.shape import transpose
from fastsfvae.jacobian.rules.softmax import safe_softmax, softmax


@rule("scaled_dot_product_attention", several=True, composed=True, covers=always)
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
    """softmax(Q K^T * scale + mask) V; PyTorch's own has no usable forward derivative.

    Where none of the query, the key and the mask depends on z, they are taken as Jets, so that no
    gradient of theirs is lost.
    """
    width = primal_of(query).shape[-1]
    if enable_gqa:
        heads = primal_of(query).shape[-3]
        query, key, value = as_jets(query, key, value)
        key, value = _repeated(key, heads), _repeated(value, heads)
    if not isinstance(query, Jet) and not isinstance(key, Jet):
        query, key = as_jets(query, key, value, attn_mask)[:2]
    factor = 1 / math.sqrt(width) if scale is None else scale
    scores = mul(_scores(query, key), factor)
    if attn_mask is not None:
        scores = add(scores, _additive(attn_mask, scores))
        return matmul(safe_softmax(scores, -1), value)
    if is_causal:
        ones = torch.ones(scores.primal.shape[-2:], dtype=torch.bool, device=scores.primal.device)
        scores = add(scores, _additive(ones.tril(), scores))
    return matmul(softmax(scores, -1), value)


def _additive(mask: Any, scores: Jet) -> Any:
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=scores.primal.dtype).masked_fill(~mask, -math.inf)
    return mask


def _repeated(x: Jet, heads: int) -> Jet:
    return repeat_interleave(x, heads // x.primal.shape[-3], -3)


def _scores(query: Any, key: Any) -> Jet:
    if isinstance(key, Jet):
        return matmul(query, transpose(key, -2, -1))
    return einsum("...qd,...kd->...qk", [query, key])
