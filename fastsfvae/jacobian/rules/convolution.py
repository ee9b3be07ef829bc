"""Convolutions and transposed convolutions: (m, B) becomes one batch, without the bias.

Weights that depend on z (of modulated convolutions, say) follow the product rule: the m tangents of
a weight are one weight with m times the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.jacobian.rules.jet import (
    Jet,
    broadcast_jet,
    fold,
    from_stack,
    full_tangent,
    primal_of,
    unfold,
)
from fastsfvae.jacobian.rules.registry import adjoint, rule
from fastsfvae.jacobian.rules.tape import once
from fastsfvae.ops._precision import layer_dtype
from fastsfvae.ops.convolution import Geometry, convolve, convolve_backward


def _register(name: str, spatial: int) -> None:
    operation = getattr(F, name)

    def geometry(weight: Tensor, *args: Any, **kwargs: Any) -> Geometry:
        return geometry_of(name, *args, kernel=weight.shape[2:], **kwargs)

    @rule(name, several=True)
    def forward(x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Jet:
        primal = operation(*map(primal_of, (x, weight, bias)), *args, **kwargs)
        terms = []
        if isinstance(x, Jet):
            batched = x.primal.ndim == spatial + 2
            tangent = fold(x.tangent) if batched else full_tangent(x)
            moved = operation(tangent, primal_of(weight), None, *args, **kwargs)
            terms.append(unfold(moved, x.tangent.shape[0]) if batched else moved)
        if isinstance(weight, Jet):
            shape = geometry(weight.primal, *args, **kwargs)
            kernels = _side_by_side(full_tangent(weight), shape)
            moved = operation(_batched(primal_of(x), spatial), kernels, None, *args, **kwargs)
            moved = _one_behind_another(moved, len(weight.tangent), shape.groups)
            terms.append(moved if primal.ndim == spatial + 2 else moved[:, 0])
        if isinstance(bias, Jet):
            channels = full_tangent(bias).unflatten(-1, (-1, *[1] * spatial))
            terms.append(channels[:, None] if primal.ndim == spatial + 2 else channels)
        return broadcast_jet(primal, sum(terms[1:], terms[0]))

    def lean(
        private: bool, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any
    ) -> Jet:
        simple = _of_value_alone((x, weight, bias)) and _is_even(weight, *args[1:3], **kwargs)
        if not simple or x.primal.ndim == spatial + 1 or x.tangent.shape[1] != x.primal.shape[0]:
            return forward(x, weight, bias, *args, **kwargs)
        stack = torch.cat([x.primal[None], x.tangent]) if x.stack is None else x.stack
        kernel = _prepared(weight, layer_dtype(weight))
        moved = convolve(fold(stack), kernel, geometry(weight, *args, **kwargs))
        y = from_stack(unfold(moved, stack.shape[0]))
        if bias is not None:
            y.primal.add_(bias.to(moved.dtype).view(-1, *[1] * spatial))
        return y

    def pull(grad: Jet, out: Jet, needs: tuple, x: Any, weight: Any, *rest: Any, **kwargs: Any):
        shape = geometry(primal_of(weight), *rest[1:], **kwargs)
        if not _of_value_alone((x, weight, *rest[:1])):
            return _pull_all(grad, needs, x, weight, rest[0] if rest else None, shape)
        if x.stack is not None and grad.stack is not None:
            pairs = [(grad.stack, x.stack)]
        else:
            pairs = [(grad.primal, x.primal), (grad.tangent, x.tangent)]
        grads: list[tuple[Any, Any]] = [
            convolve_backward(
                *(_batched(g, spatial), _batched(t, spatial), _prepared(weight, g.dtype)),
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


def _of_value_alone(args: tuple) -> bool:
    """Whether the weight and the bias do not depend on z."""
    return isinstance(args[0], Jet) and not any(isinstance(a, Jet) for a in args[1:])


def _covered(args: tuple, kwargs: dict) -> bool:
    return _is_even(primal_of(args[1]), *args[4:6], **kwargs)


def _is_even(weight: Tensor, padding: Any = 0, dilation: Any = 1, **_: Any) -> bool:
    """Whether "same" pads both sides alike, which it need not do for kernels of even extents."""
    spatial = weight.ndim - 2
    pairs = zip(weight.shape[2:], _many(dilation, spatial), strict=True)
    return padding != "same" or all(step * (extent - 1) % 2 == 0 for extent, step in pairs)


def _side_by_side(weights: Tensor, shape: Geometry) -> Tensor:
    """Weights ``[m, *weight]`` as one with m times the outputs, in each group."""
    if shape.transposed:
        return weights.movedim(0, 1).flatten(1, 2)
    return weights.unflatten(1, (shape.groups, -1)).transpose(0, 1).flatten(0, 2)


def _apart(weight: Tensor, m: int, shape: Geometry) -> Tensor:
    """Undo `_side_by_side`."""
    if shape.transposed:
        return weight.unflatten(1, (m, -1)).movedim(1, 0)
    return weight.unflatten(0, (shape.groups, m, -1)).transpose(0, 1).flatten(1, 2)


def _one_behind_another(t: Tensor, m: int, groups: int) -> Tensor:
    """The outputs ``[N, groups * m * C, *space]`` of weights side by side, by m in front."""
    return t.unflatten(1, (groups, m, -1)).movedim(2, 0).flatten(2, 3)


def _pull_all(
    grad: Jet, needs: tuple, x: Any, weight: Any, bias: Any, shape: Geometry
) -> tuple[Any, Any, Any]:
    """The adjoint of ``conv(x, w) + b``, whose tangents are ``conv(dx, w) + conv(x, dw) + db``."""
    spatial = len(shape.stride)
    value, kernel = primal_of(x), primal_of(weight)
    # [N, C, *space] and [m, N, C, *space]
    inputs, by_value = _batched(value, spatial), _batched(grad.primal, spatial)
    tangents = grad.tangent if grad.primal.ndim == spatial + 2 else grad.tangent[:, None]
    m = len(tangents)
    both = (needs[0], needs[1])

    def pulled(g: Tensor, t: Tensor, w: Tensor) -> tuple[Any, Any]:
        return convolve_backward(g, t, w, shape, both)

    grad_x, grad_w = pulled(by_value, inputs, kernel)
    moved_x: Any = None
    moved_w: Any = None
    if isinstance(weight, Jet):
        tangents = tangents.expand(m, len(inputs), *tangents.shape[2:])
        across = tangents.unflatten(2, (shape.groups, -1)).movedim(0, 2).flatten(1, 3)
        from_weight, moved_w = pulled(
            across, inputs, _side_by_side(full_tangent(weight).contiguous(), shape)
        )
        grad_x = _plus(grad_x, from_weight)
    if isinstance(x, Jet):
        along = full_tangent(x) if isinstance(weight, Jet) else x.tangent
        along = along if value.ndim == spatial + 2 else along[:, None]
        moved_x, from_tangents = pulled(fold(tangents), fold(along), kernel)
        grad_w = _plus(grad_w, from_tangents)

    if needs[0] and isinstance(x, Jet):
        moved_x = unfold(moved_x, m)
        moved_x = moved_x if value.ndim == spatial + 2 else moved_x[:, 0]
        grad_x = Jet(grad_x.reshape(value.shape), moved_x)
    elif needs[0]:
        grad_x = grad_x.reshape(value.shape)
    if needs[1] and isinstance(weight, Jet):
        grad_w = Jet(grad_w, _apart(moved_w, m, shape))
    grad_b: Any = by_value.flatten(2).sum((0, 2))
    if isinstance(bias, Jet):
        grad_b = Jet(grad_b, tangents.flatten(3).sum((1, 3)))
    return grad_x, grad_w, grad_b


def _plus(a: Any, b: Any) -> Any:
    return a if a is None else a + b


def _prepared(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in a dtype and in channels-last order, which makes all activations follow.

    It is what a CPU's vectors and a GPU's tensor cores take without a copy.
    """
    if weight.ndim != 4 or weight.device.type not in ("cpu", "cuda"):
        return weight
    last = torch.channels_last
    return once(weight, f"last {dtype}", lambda w: w.to(dtype).contiguous(memory_format=last))


def _batched(t: Tensor, spatial: int) -> Tensor:
    """[..., C, *space] as [N, C, *space]."""
    return t[None] if t.ndim == spatial + 1 else t.flatten(0, t.ndim - spatial - 2)


def _unbatched(t: Tensor, like: Tensor) -> Tensor:
    return t.view(*like.shape[: like.ndim - t.ndim + 1], *t.shape[1:])


def _many(value: Any, spatial: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * spatial if len(values) == 1 else values


def geometry_of(name: str, *args: Any, kernel: Sequence[int] = (), **kwargs: Any) -> Geometry:
    """What an operation's arguments behind its bias say.

    Args:
        name: "conv1d" to "conv3d" or "conv_transpose1d" to "conv_transpose3d".
        *args: stride, padding and so on, in the operation's order.
        kernel: the weight's extents in space, odd ones where the padding is "same".
        **kwargs: those that are given by name.
    """
    spatial = int(name[-2])
    if name.startswith("conv_transpose"):
        return _transposed_geometry(spatial, *args, **kwargs)
    shape = _geometry(spatial, *args, **kwargs)
    if shape.padding != _SAME:
        return shape
    steps = zip(kernel, shape.dilation, strict=True)
    return shape._replace(padding=tuple(step * (extent - 1) // 2 for extent, step in steps))


# Stands for the padding "same" until the kernel is known.
_SAME: Any = ("same",)


def _geometry(
    n: int, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Geometry:
    padding = 0 if padding == "valid" else padding
    sides = _SAME if padding == "same" else _many(padding, n)
    return Geometry(_many(stride, n), sides, _many(dilation, n), groups, False, (0,) * n)


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
