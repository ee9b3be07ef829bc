"""Linear layers, convolutions and matrix products.

A linear operation maps tangents as it maps values, without the bias, so (m, B) becomes one batch.
Products of two values that depend on z follow the product rule.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.jacobian.jet import (
    Jet,
    align,
    broadcast_jet,
    from_stack,
    full_tangent,
    join,
    move,
    primal_of,
    sum_over_parts,
)
from fastsfvae.jacobian.registry import adjoint, rule
from fastsfvae.jacobian.rules.arithmetic import add, scaled
from fastsfvae.jacobian.rules.shape import transpose, unsqueeze


@rule("linear", several=True)
def linear(x: Jet | Tensor, weight: Jet | Tensor, bias: Jet | Tensor | None = None) -> Jet:
    """Y = x W^T + b, so dy = dx W^T (+ x dW^T + db where they depend on z)."""
    if isinstance(x, Jet) and not isinstance(weight, Jet) and not isinstance(bias, Jet):
        if x.stack is not None:
            return _with_bias(F.linear(x.stack, weight), bias)
        tangent = x.tangent if x.primal.ndim > 1 else full_tangent(x)
        return Jet(F.linear(x.primal, weight, bias), F.linear(tangent, weight))
    product = matmul(x, transpose(weight, 0, 1) if isinstance(weight, Jet) else weight.t())
    return product if bias is None else add(product, bias)


def _with_bias(stack: Tensor, bias: Tensor | None) -> Jet:
    """A stack's Jet with the bias added to the value alone; overwrites the stack."""
    y = from_stack(stack)
    if bias is not None:
        y.primal.add_(bias)
    return y


@rule("linear_of_latents")
def linear_of_latents(x: Jet, weight: Tensor, bias: Tensor | None = None) -> Jet:
    """`linear` of z itself: the tangents are the weight's columns, the same for all samples."""
    return broadcast_jet(F.linear(x.primal, weight, bias), weight.t().unsqueeze(1))


@adjoint("linear", "linear_of_latents", fresh=True)
def _linear_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, weight: Tensor, bias: Any = None):
    def product(g: Tensor, t: Tensor) -> Tensor:
        # [*, out] and [*, in], which may be a single vector.
        return g.reshape(-1, g.shape[-1]).t() @ t.reshape(-1, t.shape[-1]).to(g.dtype)

    grad_x = move(grad, lambda g, _: g @ weight.to(g.dtype)) if needs[0] else None
    grad_weight = sum_over_parts(grad, x, product) if needs[1] else None
    return grad_x, grad_weight, grad.primal


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


@adjoint("matmul", "mm", "bmm", "linalg_matmul", covers=lambda args, kwargs: _matrices(*args))
def _matmul_adjoint(grad: Jet, out: Jet, needs: tuple, a: Any, b: Any):
    (value_a, tangent_a), (value_b, tangent_b) = _parts(a, out), _parts(b, out)
    grad_a: Any = None
    grad_b: Any = None
    if needs[0]:
        grad_a = grad.primal @ value_b.mT
        if tangent_b is not None:
            grad_a = join(grad_a, (grad.tangent @ tangent_b.mT).sum(0))
        if isinstance(a, Jet):
            grad_a = Jet(grad_a, grad.tangent @ value_b.mT)
    if needs[1]:
        grad_b = value_a.mT @ grad.primal
        if tangent_a is not None:
            grad_b = join(grad_b, (tangent_a.mT @ grad.tangent).sum(0))
        if isinstance(b, Jet):
            grad_b = Jet(grad_b, value_a.mT @ grad.tangent)
    return grad_a, grad_b


def _matrices(a: Any, b: Any) -> bool:
    return primal_of(a).ndim > 1 and primal_of(b).ndim > 1


def _parts(x: Any, out: Jet) -> tuple[Tensor, Tensor | None]:
    """Value and tangents in the result's dtype, the tangents aligned with its axes."""
    if not isinstance(x, Jet):
        return x.to(out.primal.dtype), None
    return x.primal.to(out.primal.dtype), align(x, out.primal.ndim).to(out.primal.dtype)


@rule("addmm", "baddbmm", several=True, composed=True)
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
