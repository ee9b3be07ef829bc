"""Layers on the Triton kernels that take in the activations around them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet, from_stack, stack_of
from fastsfvae.jacobian.rules.registry import RULES
from fastsfvae.jacobian.rules.rule import Rule
from fastsfvae.jacobian.rules.tape import SUMMED, once, provide, room_of, running_sums
from fastsfvae.ops._precision import autocast, layer_dtype, rounded_to_tf32
from fastsfvae.ops.latent_layer import stack_latents, stack_latents_backward
from fastsfvae.ops.tangent_activation import tangent_activation
from fastsfvae.ops.tangent_layer import Layer, stack_layer, stack_layer_backward

# Elements between the starts of two weights in one memory: a multiple of 128 bytes.
_ALIGNED = 64


def fused_layer(name: str, layer: Layer) -> Rule:
    """The rule ``(x, weight, bias, *geometry)`` of a layer and the activations that it takes in.

    Outside of a sweep these are kernels of their own around the library's layer, which autograd
    differentiates. In one, the gradient of what a layer has applied an activation to is pulled
    through that by the layer that reads it (`Layer.applied`): between the two it is the gradient
    in front of the activation.

    Args:
        name: the ATen operation, "linear", "conv2d" or "conv_transpose2d".
        layer: its geometry and activations.
    """
    library = RULES[name].forward

    def forward(x: Jet, *args: Any, **kwargs: Any) -> Jet:
        if layer.kind != "none" and not layer.applied:
            x = Jet(*tangent_activation(x.primal, x.tangent, layer.kind, layer.params))
        y = library(x, *args, **kwargs)
        if layer.behind != "none":
            y = Jet(*tangent_activation(y.primal, y.tangent, layer.behind, layer.behind_params))
        return y

    def lean(private: bool, x: Jet, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any):
        stack = autocast(stack_of(x))
        return from_stack(stack_layer(layer, stack, dense_weight(weight, stack, layer), bias))

    def pull(
        grad: Jet, out: Jet, needs: tuple, x: Jet, weight: Tensor, bias: Tensor | None = None,
        *_: Any, **__: Any,
    ):  # fmt: skip
        g = stack_of(grad)
        wanted = needs[0], needs[1], any(needs[2:3])
        dense = dense_weight(weight, g, layer)
        sums = running_sums()
        assert sums is not None, "adjoints run on a tape"
        rooms = [sums.rooms(t) for t in (weight, bias) if t is not None]
        given = layer, g, stack_of(x), dense, wanted
        of_stack = stack_layer_backward(*given, out=room_of(x), rooms=rooms)[0]
        return None if of_stack is None else from_stack(of_stack), SUMMED, SUMMED

    return Rule(name, forward, adjoint=pull, lean=lean, fresh=True)


def dense_weight(weight: Tensor, stack: Tensor, layer: Layer) -> Tensor:
    """The weight in the stack's dtype and the kernels' order, made once for all of a sweep."""
    rounds = _rounds(layer, stack.dtype)

    def make(weight: Tensor) -> Tensor:
        order = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        dense = weight.to(stack.dtype).contiguous(memory_format=order)
        return rounded_to_tf32(dense) if rounds else dense

    return once(weight, _name(stack.dtype, rounds), make)


def prepare_weights(weights: Sequence[tuple[Tensor, Layer]]) -> None:
    """Make `dense_weight`'s results for all weights that autocast casts or TF32 rounds.

    Where the weights are in the kernels' order a GPU casts all of them in one launch, or copies and
    rounds them in two; elsewhere each is copied by itself.
    """
    groups: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
    for weight, layer in weights:
        dtype = layer_dtype(weight)
        rounds = _rounds(layer, dtype)
        if rounds or dtype != weight.dtype:
            groups.setdefault((dtype, rounds), []).append(weight)
    for (dtype, rounds), group in groups.items():
        provide(group, _name(dtype, rounds), functools.partial(_side_by_side, dtype, rounds))


def _side_by_side(dtype: torch.dtype, rounds: bool, weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights in one dtype and the kernels' order, one behind another in memory."""
    starts = [0, *itertools.accumulate(-(-w.numel() // _ALIGNED) * _ALIGNED for w in weights)]
    room = torch.empty(starts.pop(), dtype=dtype, device=weights[0].device)

    def parts(room: Tensor) -> list[Tensor]:
        return [_part(room[at:], w) for at, w in zip(starts, weights, strict=True)]

    torch._foreach_copy_(parts(room), list(weights))
    return parts(rounded_to_tf32(room) if rounds else room)


def _part(room: Tensor, weight: Tensor) -> Tensor:
    """The beginning of flat memory as a tensor of the weight's shape, in the kernels' order."""
    room = room[: weight.numel()]
    if weight.ndim != 4:
        return room.view(weight.shape)
    return room.view(weight.movedim(1, -1).shape).movedim(-1, 1)


def latent_layer(kind: str, params: tuple[float, ...], product: str = "ieee") -> Rule:
    """The rule ``(z, weight, bias)`` of `linear_of_latents` and the activation behind it.

    Outside of a sweep these are the library's layer, which autograd differentiates, and the
    activation's kernel. In one, whatever kind it is, the gradient that comes back is that of what
    lies behind the activation: this layer pulls it through, not the one that reads it.

    Args:
        kind: of the activation, as in `fastsfvae.ops.tangent_activation.tangent_activation`.
        params: likewise.
        product: of float32 numbers in the layer that reads it, as `Layer` has it.
    """
    name = "linear_of_latents"
    library = RULES[name].forward

    def forward(x: Jet, weight: Tensor, bias: Tensor | None = None) -> Jet:
        y = library(x, weight, bias)
        return Jet(*tangent_activation(y.primal, y.tangent, kind, params))

    def lean(private: bool, x: Jet, weight: Tensor, bias: Tensor | None = None) -> Jet:
        return from_stack(stack_latents(x.primal, weight, bias, kind, params, product))

    def pull(
        grad: Jet, out: Jet, needs: tuple, x: Jet, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Any, ...]:
        wanted = needs[0], needs[1], any(needs[2:])
        of_z, *others = stack_latents_backward(
            stack_of(grad), x.primal, weight, bias, kind, params, wanted
        )
        # Its tangents are constants, whose gradient is not read.
        return None if of_z is None else Jet(of_z, x.tangent), *others

    return Rule(name, forward, adjoint=pull, lean=lean, fresh=True)


def _rounds(layer: Layer, dtype: torch.dtype) -> bool:
    # Products in TF32 cut their operands off.
    return layer.product == "tf32" and dtype == torch.float32


def _name(dtype: torch.dtype, rounds: bool) -> str:
    return f"dense {dtype}{' rounded' if rounds else ''}"
