"""Linear layers, convolutions and matrix products.

A linear operation maps tangents as it maps values, without the bias, so (m, B) becomes one batch.
Products of two values that depend on z follow the product rule.
"""

from __future__ import annotations

import string
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.jacobian.rules.arithmetic import add, jet_product, mul
from fastsfvae.jacobian.rules.jet import (
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
from fastsfvae.jacobian.rules.registry import adjoint, always, rule
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


@adjoint("linear_of_latents", fresh=True)
def _latents_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, weight: Tensor, bias: Any = None):
    if weight.ndim == 1:
        return _linear_adjoint(grad, out, needs, x, weight, bias)
    grad_x = grad_weight = None
    if needs[0]:
        # Its tangents are constants, whose gradient is not read.
        grad_x = Jet(grad.primal @ weight.to(grad.primal.dtype), x.tangent)
    if needs[1]:
        # The tangents that the samples share are the weight's columns.
        columns, values = grad.tangent.sum_to_size(out.tangent.shape).squeeze(1).t(), x.primal
        grad_weight = torch.addmm(columns, grad.primal.t(), values.to(columns.dtype))
    return grad_x, grad_weight, grad.primal


@adjoint("linear", fresh=True)
def _linear_adjoint(grad: Jet, out: Jet, needs: tuple, x: Jet, weight: Tensor, bias: Any = None):
    def product(g: Tensor, t: Tensor) -> Tensor:
        # [*, out] and [*, in], which may be a single vector.
        return g.reshape(-1, g.shape[-1]).t() @ t.reshape(-1, t.shape[-1]).to(g.dtype).conj()

    of_bias = grad.primal
    if weight.ndim == 1:
        # A matrix of one row, which the result lacks.
        weight, grad = weight[None], _unsqueezed(grad, -1)
    grad_x = move(grad, lambda g, _: g @ weight.to(g.dtype).conj()) if needs[0] else None
    grad_weight = sum_over_parts(grad, x, product) if needs[1] else None
    return grad_x, grad_weight, of_bias


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
    keeps_batch = axis + x.primal.ndim > 0
    return move(x, lambda t, _: t.squeeze(axis), keeps_batch)


@adjoint("matmul", "mm", "bmm", "mv", "linalg_matmul", covers=lambda args, _: _batch_stays(*args))
def _matmul_adjoint(grad: Jet, out: Jet, needs: tuple, a: Any, b: Any):
    row, column = primal_of(a).ndim == 1, primal_of(b).ndim == 1
    # Vectors as matrices of one row or column, which the result lacks.
    if row:
        a, grad, out = a[None], _unsqueezed(grad, -2), _unsqueezed(out, -2)
    if column:
        b, grad, out = b[:, None], _unsqueezed(grad, -1), _unsqueezed(out, -1)
    if isinstance(b, Jet) and b.primal.ndim == 2:
        b = _full(b)
    (value_a, tangent_a), (value_b, tangent_b) = _parts(a, out), _parts(b, out)
    if tangent_a is not None and out.primal.ndim == 2:
        # The other factor's gradient sums over the rows, which are the samples.
        tangent_a = tangent_a.expand(-1, grad.tangent.shape[1], -1)
    grad_a: Any = None
    grad_b: Any = None
    if needs[0]:
        grad_a = grad.primal @ value_b.mH
        if tangent_b is not None:
            grad_a = join(grad_a, (grad.tangent @ tangent_b.mH).sum(0))
        if isinstance(a, Jet):
            grad_a = Jet(grad_a, grad.tangent @ value_b.mH)
    if needs[1]:
        grad_b = value_a.mH @ grad.primal
        if tangent_a is not None:
            grad_b = join(grad_b, (tangent_a.mH @ grad.tangent).sum(0))
        if isinstance(b, Jet):
            grad_b = Jet(grad_b, value_a.mH @ grad.tangent)
    if needs[0] and row:
        grad_a = grad_a.squeeze(-2)
    if needs[1] and column:
        grad_b = grad_b.squeeze(-1)
    return grad_a, grad_b


def _batch_stays(a: Any, b: Any) -> bool:
    """Whether no vector depends on z: it would have the batch as its only axis."""
    return all(primal_of(x).ndim > 1 or not isinstance(x, Jet) for x in (a, b))


def _unsqueezed(x: Jet, axis: int) -> Jet:
    return Jet(x.primal.unsqueeze(axis), x.tangent.unsqueeze(axis))


def _parts(x: Any, out: Jet) -> tuple[Tensor, Tensor | None]:
    """Value and tangents in the result's dtype, the tangents aligned with its axes."""
    if not isinstance(x, Jet):
        return x.to(out.primal.dtype), None
    return x.primal.to(out.primal.dtype), align(x, out.primal.ndim).to(out.primal.dtype)


@rule("addmm", "baddbmm", several=True, composed=True, covers=jet_product)
def addmm(bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Jet:
    """Beta * bias + alpha * A B."""
    if not isinstance(a, Jet) and not isinstance(b, Jet):
        return add(alpha * torch.matmul(a, b), bias, alpha=beta)
    product = mul(matmul(a, b), alpha)
    return product if beta == 0 else add(product, bias, alpha=beta)


@rule("bilinear", several=True, composed=True, covers=lambda args, _: _bilinear_covers(*args))
def bilinear(a: Any, b: Any, weight: Any, bias: Any = None) -> Jet:
    """A W_o b + bias for each output o."""
    product = einsum("...i,oij,...j->...o", [a, weight, b])
    return product if bias is None else add(product, bias)


def _bilinear_covers(a: Any, b: Any, weight: Any, bias: Any = None) -> bool:
    return any(isinstance(x, Jet) for x in (a, b, weight))


@rule("einsum", several=True)
def einsum(equation: str, operands: list[Any], *, path: Any = None) -> Jet:
    """Multilinear: one term per operand that depends on z, with one more letter for m."""
    inputs, output = _subscripts(equation, operands)
    factors = [(name, primal_of(x)) for name, x in zip(inputs, operands, strict=True)]
    terms = []
    for k, operand in enumerate(operands):
        if isinstance(operand, Jet):
            moved = (_M + inputs[k], full_tangent(operand))
            terms.append(_contract(_M + output, [*factors[:k], moved, *factors[k + 1 :]]))
    return broadcast_jet(_contract(output, factors), sum(terms[1:], terms[0]))


# The tangents' letter, which `_subscripts` leaves free.
_M = "Z"


def _contract(output: str, factors: list[tuple[str, Tensor]]) -> Tensor:
    names, tensors = zip(*factors, strict=True)
    return torch.einsum(f"{','.join(names)}->{output}", *tensors)


def _subscripts(equation: str, operands: list[Any]) -> tuple[list[str], str]:
    """The letters of each operand and of the result, an ellipsis spelled out."""
    joined, arrow, output = equation.replace(" ", "").partition("->")
    inputs = joined.split(",")
    letters = sorted(set(joined) - set(",."))
    if not arrow:
        once = "".join(c for c in letters if joined.count(c) == 1)
        output = ("..." if "..." in joined else "") + once
    ranks = [
        primal_of(x).ndim - len(name.replace("...", ""))
        for x, name in zip(operands, inputs, strict=True)
    ]
    free = "".join(c for c in string.ascii_letters if c not in letters and c != _M)[: max(ranks)]

    def spelled(name: str, rank: int) -> str:
        # Aligned at the last axis, as broadcasting is.
        return name.replace("...", free[len(free) - rank :])

    return [spelled(*pair) for pair in zip(inputs, ranks, strict=True)], spelled(output, len(free))


def _apart(name: str, value: Tensor, used: str) -> tuple[str, list[tuple[str, Tensor]]]:
    """A gradient's letters, each its own, and the unit matrices that join those of a diagonal."""
    free = iter(c for c in string.ascii_letters if c not in used and c != _M)
    letters, joints = "", []
    for letter, extent in zip(name, value.shape, strict=True):
        if letter in letters:
            other = next(free)
            unit = torch.eye(extent, dtype=value.dtype, device=value.device)
            joints.append((letter + other, unit))
            letter = other
        letters += letter
    return letters, joints


@adjoint("einsum", covers=always)
def _einsum_adjoint(
    grad: Jet, out: Jet, needs: tuple, equation: str, operands: list[Any], **_: Any
) -> tuple[None, list[Any]]:
    inputs, output = _subscripts(equation, operands)
    dtype = grad.primal.dtype
    # Gradients of complex values take conjugate factors; on real ones that does nothing.
    values = [primal_of(x).to(dtype).conj() for x in operands]
    factors = list(zip(inputs, values, strict=True))
    by_value, by_tangents = (output, grad.primal), (_M + output, grad.tangent)

    def pulled(k: int) -> Any:
        name, value = factors[k]
        others = [(i, factor) for i, factor in enumerate(factors) if i != k]
        # Letters that the operand was summed over by itself: its gradient repeats along them.
        elsewhere = output + "".join(n for _, (n, _) in others)
        ones = [(c, value.new_ones(n)) for c, n in zip(name, value.shape, strict=True)]
        ones = [(c, one) for c, one in dict(ones).items() if c not in elsewhere]
        name, joints = _apart(name, value, "".join(inputs))
        fixed = [factor for _, factor in others] + ones + joints
        result = _contract(name, [by_value, *fixed])
        for position, (j, _) in enumerate(others):
            if isinstance(operands[j], Jet):
                moved = (_M + inputs[j], full_tangent(operands[j]).to(dtype).conj())
                swapped = [*fixed[:position], moved, *fixed[position + 1 :]]
                result = result + _contract(name, [by_tangents, *swapped])
        if not isinstance(operands[k], Jet):
            return result
        return Jet(result, _contract(_M + name, [by_tangents, *fixed]))

    return None, [pulled(k) if need else None for k, need in enumerate(needs[1])]
