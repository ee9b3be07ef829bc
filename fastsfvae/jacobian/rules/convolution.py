"""Convolutions and transposed convolutions: (m, B) becomes one batch, without the bias."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.jacobian.rules.fallback import generic_rule
from fastsfvae.jacobian.rules.jet import Jet, fold, from_stack, full_tangent, unfold
from fastsfvae.jacobian.rules.registry import adjoint, rule
from fastsfvae.jacobian.rules.tape import once
from fastsfvae.ops.convolution import Geometry, convolve, convolve_backward


def _register(name: str, spatial: int) -> None:
    operation, geometry = getattr(F, name), functools.partial(geometry_of, name)

    @rule(name, several=True)
    def forward(x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Jet:
        if not isinstance(x, Jet) or isinstance(weight, Jet) or isinstance(bias, Jet):
            return generic_rule(operation, "")(x, weight, bias, *args, **kwargs)
        primal = operation(x.primal, weight, bias, *args, **kwargs)
        if x.primal.ndim == spatial + 1:
            return Jet(primal, operation(full_tangent(x), weight, None, *args, **kwargs))
        moved = operation(fold(x.tangent), weight, None, *args, **kwargs)
        return Jet(primal, unfold(moved, x.tangent.shape[0]))

    def lean(
        private: bool, x: Jet, weight: Tensor, bias: Any = None, *args: Any, **kwargs: Any
    ) -> Jet:
        if x.primal.ndim == spatial + 1 or x.tangent.shape[1] != x.primal.shape[0]:
            return forward(x, weight, bias, *args, **kwargs)
        stack = torch.cat([x.primal[None], x.tangent]) if x.stack is None else x.stack
        moved = convolve(fold(stack), _prepared(weight), geometry(*args, **kwargs))
        y = from_stack(unfold(moved, stack.shape[0]))
        if bias is not None:
            y.primal.add_(bias.view(-1, *[1] * spatial))
        return y

    def pull(grad: Jet, out: Jet, needs: tuple, x: Jet, weight: Tensor, *rest: Any, **kwargs: Any):
        shape = geometry(*rest[1:], **kwargs)
        if x.stack is not None and grad.stack is not None:
            pairs = [(grad.stack, x.stack)]
        else:
            pairs = [(grad.primal, x.primal), (grad.tangent, x.tangent)]
        grads: list[tuple[Any, Any]] = [
            convolve_backward(
                *(_batched(g, spatial), _batched(t, spatial), _prepared(weight)),
                *(shape, needs[:2]),
            )
            for g, t in pairs
        ]
        grad_x = grad_bias = None
        if needs[0]:
            parts = [_unbatched(g, t) for (g, _), (_, t) in zip(grads, pairs, strict=True)]
            grad_x = from_stack(parts[0]) if len(parts) == 1 else Jet(*parts)
        if len(needs) > 2 and needs[2]:
            grad_bias = _batched(grad.primal, spatial).flatten(2).sum((0, 2))
        return grad_x, (sum(g for _, g in grads) if needs[1] else None), grad_bias

    adjoint(name, covers=_covered, lean=lean, fresh=True)(pull)


def _covered(args: tuple, kwargs: dict) -> bool:
    # "same" may pad one side more than the other.
    padding = args[4] if len(args) > 4 else kwargs.get("padding")
    only = isinstance(args[0], Jet) and not any(isinstance(a, Jet) for a in args[1:])
    return only and padding != "same"


def _prepared(weight: Tensor) -> Tensor:
    """The weight in channels-last order, which makes all activations follow.

    It is what a CPU's vectors and a GPU's tensor cores take without a copy.
    """
    if weight.ndim != 4 or weight.device.type not in ("cpu", "cuda"):
        return weight
    last = torch.channels_last
    return once(weight, "channels_last", lambda w: w.contiguous(memory_format=last))


def _batched(t: Tensor, spatial: int) -> Tensor:
    """[..., C, *space] as [N, C, *space]."""
    return t[None] if t.ndim == spatial + 1 else t.flatten(0, t.ndim - spatial - 2)


def _unbatched(t: Tensor, like: Tensor) -> Tensor:
    return t.view(*like.shape[: like.ndim - t.ndim + 1], *t.shape[1:])


def _many(value: Any, spatial: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * spatial if len(values) == 1 else values


def geometry_of(name: str, *args: Any, **kwargs: Any) -> Geometry:
    """What an operation's arguments behind its bias say.

    Args:
        name: "conv1d" to "conv3d" or "conv_transpose1d" to "conv_transpose3d".
        *args: stride, padding and so on, in the operation's order.
        **kwargs: those that are given by name.
    """
    read = _transposed_geometry if name.startswith("conv_transpose") else _geometry
    return read(int(name[-2]), *args, **kwargs)


def _geometry(
    n: int, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Geometry:
    padding = 0 if padding == "valid" else padding
    sizes = _many(stride, n), _many(padding, n), _many(dilation, n)
    return Geometry(*sizes, groups, False, (0,) * n)


def _transposed_geometry(
    n: int,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Geometry:
    sizes = _many(stride, n), _many(padding, n), _many(dilation, n)
    return Geometry(*sizes, groups, True, _many(output_padding, n))


for _spatial in (1, 2, 3):
    _register(f"conv{_spatial}d", _spatial)
    _register(f"conv_transpose{_spatial}d", _spatial)
