"""Activations on the Triton kernel: one pass over the tangents, which also adds a layer's bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet, from_stack
from fastsfvae.jacobian.rules.rule import Rule
from fastsfvae.ops.tangent_activation import (
    reads_result,
    stack_activation,
    stack_activation_backward,
    tangent_activation,
)

# The arguments of a call -> the kernel's kind and parameters, or None where there is no kernel.
Read = Callable[..., tuple[str, tuple[float, ...]] | None]
_KERNELS: dict[str, Read] = {}


def kernel_of(
    name: str, args: tuple, kwargs: dict[str, Any]
) -> tuple[str, tuple[float, ...]] | None:
    """The kernel's kind and parameters of an operation, or None where there is no kernel.

    Args:
        name: the ATen operation.
        args: its arguments behind the first.
        kwargs: those that are given by name.
    """
    found = _KERNELS[name](*args, **kwargs) if name in _KERNELS else None
    return None if found is None else (found[0], tuple(float(p) for p in found[1]))


def triton_rule(name: str, read: Read) -> Rule:
    """The rule ``(x, bias, axis, *arguments)`` of phi(a + bias, *arguments)."""
    _KERNELS[name] = read

    def kernel(args: tuple, kwargs: dict[str, Any]) -> tuple[str, tuple[float, ...]]:
        found = kernel_of(name, args, kwargs)
        assert found is not None
        return found

    def forward(x: Jet, bias: Tensor | None, axis: int, *args: Any, **kwargs: Any) -> Jet:
        a = x.primal
        if bias is not None:
            a = (a + bias.view(-1, *[1] * (a.ndim - 1 - axis % a.ndim))).to(a.dtype)
        return Jet(*tangent_activation(a, x.tangent, *kernel(args, kwargs), "triton"))

    def lean(
        private: bool, x: Jet, bias: Tensor | None, axis: int, *args: Any, **kwargs: Any
    ) -> Jet:
        kind, params = kernel(args, kwargs)
        out = x.stack if private and reads_result(kind, params) else None
        return from_stack(stack_activation(x.primal, x.tangent, kind, params, bias, axis, out))

    def pull(
        grad: Jet,
        out: Jet,
        needs: tuple,
        x: Jet,
        bias: Tensor | None,
        axis: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Jet, Tensor | None]:
        kind, params = kernel(args, kwargs)
        # Where the result tells the slope, it may have taken the argument's place.
        a = (out.primal, None) if reads_result(kind, params) else (x.primal, x.tangent)
        moved = None if reads_result(kind, params) else bias
        pulled = stack_activation_backward(
            *(*a, grad.primal, grad.tangent, kind, params, moved, axis, grad.stack)
        )
        grad_bias = None
        if needs[1] and bias is not None:
            others = [i for i in range(out.primal.ndim) if i != axis % out.primal.ndim]
            grad_bias = pulled[0].sum(others, dtype=bias.dtype)
        return from_stack(pulled), grad_bias

    return Rule(
        name,
        forward,
        adjoint=pull,
        covers=lambda args, kwargs: kernel_of(name, args[1:], kwargs) is not None,
        lean=lean,
        fresh=True,
        overwrites=True,
    )
