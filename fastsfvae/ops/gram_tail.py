"""A decoder's last layer, by kernels that take it with the Gram of its Jacobian.

The layer is a transposed convolution with kernel 4, stride 2, padding 1 and few channels out,
between two activations of which either may be missing. The residual that its values leave is a
product of its own, as the Gram needs it; tangents go through `gram_tail`, which writes the
Jacobian for the backward alone, as it lies in its registers. No autograd and no compiler sees these
functions, so they call the launchers themselves.

Where the Jacobian is wanted, or the layer is another, `stack_layer` or `convolve` and
`gram_project` do the same in two steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastsfvae._ranges import ranged
from fastsfvae.kernels._contract import (
    GRAM_TAIL_MAX_CHANNELS,
    GRAM_TAIL_MAX_M,
    PARAMETERS,
)
from fastsfvae.ops import _library, _precision, tangent_layer
from fastsfvae.ops.tangent_activation import stack_activation, stack_activation_backward
from fastsfvae.ops.tangent_layer import Layer, stack_layer, stack_layer_backward

if TYPE_CHECKING:
    from fastsfvae.ops.partial_sums import PartialSums

# Numbers of a position in the Jacobian's rows; a sample's are counted in int32.
_COLUMNS, _COUNTED = 16, 2**31


class Tail(NamedTuple):
    """A last layer, and what it is applied to.

    Attributes:
        layer: its geometry and the activation in front; one that `largest_batch` takes.
        stack: value and tangents in front of that, or behind it where `layer` says that it is
            applied, ``[1 + m, B, Ci, H, W]``.
        weight: ``[Ci, Co, 4, 4]``.
        bias: ``[Co]`` or None.
        behind: the activation behind the layer, "none" or as `Layer` has it.
        behind_params: its parameters.
        dense: the weight as products take it: channels-last, in the stack's dtype, and rounded to
            TF32 where they are TF32's; None where nobody has made it (`with_dense`).
        sums: for parts of the weight's and the bias's gradient, which whoever holds it adds up;
            None for their sums at once.
    """

    layer: Layer
    stack: Tensor
    weight: Tensor
    bias: Tensor | None = None
    behind: str = "none"
    behind_params: tuple[float, ...] = ()
    dense: Tensor | None = None
    sums: PartialSums | None = None


class Values(NamedTuple):
    """What a tail's values are wanted for, each float32 ``[B, Co, 2H, 2W]``, channels last.

    Attributes:
        r: x - output; 0 without data.
        output: of the activation behind the layer, or of the layer without one; None where r was
            made at once.
        argument: of that activation; None without one.
        slope: its derivative there; None without one.
    """

    r: Tensor
    output: Tensor | None = None
    argument: Tensor | None = None
    slope: Tensor | None = None


class TailGradients(NamedTuple):
    """Gradients of a tail's stack, weight and bias, and of the data where it is wanted.

    Those of weight and bias are None where `Tail.sums` has their parts.
    """

    stack: Tensor
    weight: Tensor | None
    bias: Tensor | None
    x: Tensor | None


def largest_batch(
    layer: Layer,
    slots: int,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    dtype: torch.dtype,
) -> int:
    """How many samples one call takes at most; 0 where the kernels do not take the layer.

    Args:
        layer: the last one of a decoder.
        slots: of the stack, 1 + m.
        x_shape: of one sample in front of it, ``[Ci, H, W]``.
        weight_shape: ``[Ci, Co, kh, kw]``.
        dtype: of the stack.
    """
    g, rows = layer.geometry, _COLUMNS * math.prod(x_shape[1:])
    fits = (
        g is not None
        and g.transposed
        and (g.stride, g.padding, g.output_padding) == ((2, 2), (1, 1), (0, 0))
        and slots - 1 <= GRAM_TAIL_MAX_M
        and weight_shape[1] <= GRAM_TAIL_MAX_CHANNELS
        and tuple(weight_shape[2:]) == (4, 4)
        and (layer.kind == "none" or layer.kind in PARAMETERS)
        and rows < _COUNTED
    )
    return tangent_layer.largest_batch(layer, slots, x_shape, weight_shape, dtype) if fits else 0


def with_dense(tail: Tail) -> Tail:
    """The same tail, with a dense weight if it has none."""
    if tail.dense is not None:
        return tail
    dense = tail.weight.to(tail.stack.dtype, memory_format=torch.channels_last)
    return tail._replace(dense=_precision.rounded_to_tf32(dense) if _rounds(tail) else dense)


@ranged("last layer")
def tail_values(tail: Tail, x: Tensor | None) -> Values:
    """Run the layer and the activation behind it on the value alone, and subtract it from the data.

    Args:
        tail: the layer.
        x: data ``[B, Co, 2H, 2W]``; None for the output itself.

    Raises:
        RuntimeError: a device that Triton cannot reach.
        TypeError: a dtype that the kernels do not take.
        ValueError: float64, an unknown kind or a wrong number of parameters.
    """
    from fastsfvae.kernels._gram_tail_residual import residual, takes

    front = tail.layer.front
    if x is not None and tail.behind == "none" and takes(x, front):
        _library.require_triton(tail.stack)
        return Values(residual(tail.stack[0], _dense(tail), tail.bias, x, front))
    output, argument, slope = tail_output(tail), None, None
    if tail.behind != "none":
        argument = output
        output, slope = stack_activation(output, _ones(output), tail.behind, tail.behind_params)
    # The kernels read it in the output's memory order.
    r = torch.empty_like(output)
    r = r.zero_() if x is None else torch.sub(x, output, out=r)
    return Values(r, output, argument, slope)


def tail_output(tail: Tail) -> Tensor:
    """The layer's values, in front of an activation behind it: float32, channels last."""
    given = tail.layer, tail.stack[:1], _dense(tail), tail.bias
    return stack_layer(*given, out_dtype=torch.float32)[0]


@ranged("gram")
def tail_partials(
    tail: Tail,
    values: Values,
    lost: Tensor | None = None,
    Z: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 ``(G [S, B, m, m], p [S, B, m], rr [S, B])`` of the tail's Jacobian, in S parts.

    Args:
        tail: the layer.
        values: of `tail_values`; a residual that is channels-last is not copied.
        lost: bool ``[B]``, for a float32 stack; the results are then float64, and those of samples
            that it does not mark uninitialised.
        Z: of `empty_rows`, filled for the backward; None where none is wanted.
    """
    from fastsfvae.kernels.gram_tail import gram_tail_partials

    _library.require_triton(tail.stack)
    # What is rescued takes no weight that has been rounded.
    weight = _dense(tail) if lost is None else tail.weight
    return gram_tail_partials(
        *(tail.stack[1:], weight, values.r), **_options(tail, values), lost=lost, Z=Z
    )


def empty_rows(tail: Tail) -> Tensor:
    """Room for the Jacobian in front of the slope, in the kernels' order: ``[m, B, H, W, 16]``."""
    from fastsfvae.kernels.gram_tail import empty_rows

    return empty_rows(tail.stack[1:])


@ranged("gram backward")
def tail_backward(
    tail: Tail,
    values: Values,
    Z: Tensor,
    M: Tensor,
    u: Tensor,
    g_rr: Tensor,
    df: Tensor | None = None,
    of_data: bool = True,
) -> TailGradients:
    """Pull cotangents of G, p and rr back to the data and to all that the tail was made of.

    Args:
        tail: as in the forward.
        values: likewise; as r = x - output, its gradient is the data's and, negated, the output's.
        Z: as the forward has filled it.
        M: dG + dG^T, ``[B, m, m]``.
        u: dp, ``[B, m]``.
        g_rr: d rr, ``[B]``.
        df: of the output, ``[B, Co, 2H, 2W]``, besides; None for nothing.
        of_data: whether the data's gradient is wanted.

    Returns:
        The stack's gradient in its dtype, in channels-last order, the weight's and the bias's in
        theirs and the data's in float32.
    """
    from fastsfvae.kernels._gram_tail_weight import leave_values, parts_of_values
    from fastsfvae.kernels.gram_tail_backward import gram_tail_bwd
    from fastsfvae.ops.partial_sums import PartialSums

    sums = PartialSums() if tail.sums is None else tail.sums
    # What products read of the gradient of the values is rounded below, or by the kernel.
    layer = tail.layer._replace(grad_rounded=True)
    stack, weight, front = tail.stack, _dense(tail), layer.front
    # Whether the kernel's gradient of the output is that of the values, which products read.
    finished, rounds = df is None and values.slope is None, _rounds(tail)
    grad = torch.empty_like(stack.flatten(0, 1), memory_format=torch.channels_last)
    grad = grad.unflatten(0, stack.shape[:2])
    pulled = gram_tail_bwd(
        *(stack[1:], weight, values.r, Z, M, u, g_rr),
        **_options(tail, values),
        out=grad[1:],
        output_dtype=stack.dtype if finished else torch.float32,
        output_product=tail.layer.product if finished else "ieee",
        rooms=sums.rooms(tail.weight),
        spare=parts_of_values(stack[0], weight.shape[1], front),
        of_data=of_data,
    )
    d_values = pulled.output if df is None else pulled.output.add_(df)
    if pulled.slope is not None:
        assert values.argument is not None
        # The slope is the derivative of the output along one tangent of ones.
        d_values = stack_activation_backward(
            *(values.argument, _ones(d_values), d_values, pulled.slope[None]),
            *(tail.behind, tail.behind_params),
        )[0]
    d_values = d_values.to(stack.dtype)
    if rounds and not finished:
        d_values = _precision.rounded_to_tf32(d_values)
    stack_layer_backward(
        *(layer, d_values[None], stack[:1], weight),
        needs=(True, False, False),
        out=grad[:1],
    )
    if pulled.a is not None:
        grad[0].add_(pulled.a)
        if rounds:
            # As all else that this makes, for the layer in front.
            grad[0].copy_(_precision.rounded_to_tf32(grad[0]))
    bias = tail.bias if tail.bias is not None and sums.wants(tail.bias) else None
    if bias is not None or sums.wants(tail.weight):
        bias_rooms = None if bias is None else sums.rooms(bias)
        leave_values(pulled.room, stack[0], d_values, front, bias_rooms)
    d_weight = d_bias = None
    if tail.sums is None:
        (_, d_weight), *of_bias = sums.add_up()
        d_bias = of_bias[0][1] if of_bias else None
    return TailGradients(grad, d_weight, d_bias, pulled.r)


def _rounds(tail: Tail) -> bool:
    """Whether what the layer multiplies is rounded to TF32."""
    return tail.layer.product == "tf32" and tail.stack.dtype == torch.float32


def _dense(tail: Tail) -> Tensor:
    dense = with_dense(tail).dense
    assert dense is not None
    return dense


def _ones(y: Tensor) -> Tensor:
    """One tangent that all samples share, ``[1, 1, *F]``, in y's memory order."""
    return torch.ones_like(y[:1])[None]


def _options(tail: Tail, values: Values) -> dict:
    kind = tail.layer.kind
    return {
        "a": None if kind == "none" else tail.stack[0],
        "kind": kind,
        "params": tail.layer.params,
        "applied": tail.layer.applied,
        "rounded": tail.layer.rounded,
        "slope": values.slope,
        "input_precision": tail.layer.product,
    }
