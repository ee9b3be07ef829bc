"""Linear layers, convolutions and matrix products.

A linear operation maps tangents as it maps values, without the bias, so (m, B) becomes one batch.
Products of two values that depend on z follow the product rule.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.jacobian.fallback import generic_rule
from fastsfvae.jacobian.jet import (
    Jet,
    align,
    broadcast_jet,
    fold,
    full_tangent,
    primal_of,
    unfold,
)
from fastsfvae.jacobian.registry import rule
from fastsfvae.jacobian.rules.arithmetic import add, scaled
from fastsfvae.jacobian.rules.shape import transpose, unsqueeze


@rule("linear", several=True)
def linear(x: Jet | Tensor, weight: Jet | Tensor, bias: Jet | Tensor | None = None) -> Jet:
    """Y = x W^T + b, so dy = dx W^T (+ x dW^T + db where they depend on z)."""
    if isinstance(x, Jet) and not isinstance(weight, Jet) and not isinstance(bias, Jet):
        tangent = x.tangent if x.primal.ndim > 1 else full_tangent(x)
        return Jet(F.linear(x.primal, weight, bias), F.linear(tangent, weight))
    product = matmul(x, transpose(weight, 0, 1) if isinstance(weight, Jet) else weight.t())
    return product if bias is None else add(product, bias)


def _convolution(name: str, spatial: int):
    operation = getattr(F, name)

    @rule(name, several=True)
    def convolution(x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Jet:
        if not isinstance(x, Jet) or isinstance(weight, Jet) or isinstance(bias, Jet):
            return generic_rule(operation, "")(x, weight, bias, *args, **kwargs)
        primal = operation(x.primal, weight, bias, *args, **kwargs)
        if x.primal.ndim == spatial + 1:
            return Jet(primal, operation(full_tangent(x), weight, None, *args, **kwargs))
        moved = operation(fold(x.tangent), weight, None, *args, **kwargs)
        return Jet(primal, unfold(moved, x.tangent.shape[0]))

    return convolution


for _spatial in (1, 2, 3):
    _convolution(f"conv{_spatial}d", _spatial)
    _convolution(f"conv_transpose{_spatial}d", _spatial)


@rule("matmul", "mm", "bmm", "mv", "linalg_matmul", several=True)
def matmul(a: Jet | Tensor, b: Jet | Tensor) -> Jet:
    """d(A B) = dA B + A dB, with torch.matmul's broadcasting."""
    value_a, value_b = primal_of(a), primal_of(b)
    if value_a.ndim == 1:
        row = matmul(unsqueeze(a, 0) if isinstance(a, Jet) else a[None], b)
        return _squeezed(row, -2 if value_b.ndim > 1 else -1)
    if value_b.ndim == 1:
        return _squeezed(matmul(a, unsqueeze(b, 1) if isinstance(b, Jet) else b[:, None]), -1)
    primal = torch.matmul(value_a, value_b)
    terms = []
    if isinstance(a, Jet):
        terms.append(torch.matmul(align(a, value_b.ndim), value_b))
    if isinstance(b, Jet):
        # The rows of a matrix are summed over: they cannot stay shared between samples.
        tangent = align(b, value_a.ndim) if value_b.ndim > 2 else align(_full(b), value_a.ndim)
        terms.append(torch.matmul(value_a, tangent))
    return broadcast_jet(primal, sum(terms[1:], terms[0]))


def _full(x: Jet) -> Jet:
    return Jet(x.primal, full_tangent(x))


def _squeezed(x: Jet, axis: int) -> Jet:
    return Jet(x.primal.squeeze(axis), full_tangent(x).squeeze(axis))


@rule("addmm", "baddbmm", several=True)
def addmm(bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Jet:
    """Beta * bias + alpha * A B."""
    product = matmul(a, b)
    product = product if alpha == 1 else scaled(product, alpha)
    if beta == 0:
        return product
    if beta != 1:
        bias = scaled(bias, beta) if isinstance(bias, Jet) else bias * beta
    return add(product, bias)


@rule("einsum", several=True)
def einsum(equation: str, operands: list[Any], *, path: Any = None) -> Jet:
    """Multilinear: one term per operand that depends on z, with one more letter for m."""
    values = [primal_of(x) for x in operands]
    equation = equation.replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    if not arrow:
        letters = sorted(c for c in set(inputs) if c.isalpha() and inputs.count(c) == 1)
        output = ("..." if "..." in inputs else "") + "".join(letters)
    free = next(c for c in "mMqQxXzZuvwabcdefghijklnoprsty" if c not in equation)
    terms = []
    for index, operand in enumerate(operands):
        if isinstance(operand, Jet):
            names = inputs.split(",")
            names[index] = free + names[index]
            tensors = list(values)
            tensors[index] = full_tangent(operand)
            terms.append(torch.einsum(f"{','.join(names)}->{free}{output}", *tensors))
    return broadcast_jet(torch.einsum(equation, *values), sum(terms[1:], terms[0]))
