"""Layers on the Triton kernels that take in the activations around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet, from_stack, stack_of
from fastsfvae.jacobian.rules.registry import RULES
from fastsfvae.jacobian.rules.rule import Rule
from fastsfvae.jacobian.rules.tape import once, provide
from fastsfvae.ops._precision import autocast, layer_dtype, rounded_to_tf32
from fastsfvae.ops.latent_layer import stack_latents, stack_latents_backward
from fastsfvae.ops.tangent_activation import tangent_activation
from fastsfvae.ops.tangent_layer import Layer, stack_layer, stack_layer_backward


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

    def pull(grad: Jet, out: Jet, needs: tuple, x: Jet, weight: Tensor, *_: Any, **__: Any):
        g = stack_of(grad)
        wanted = needs[0], needs[1], any(needs[2:3])
        dense = dense_weight(weight, g, layer)
        pulled, *others = stack_layer_backward(layer, g, stack_of(x), dense, wanted)
        return None if pulled is None else from_stack(pulled), *others

    return Rule(name, forward, adjoint=pull, lean=lean, fresh=True)


def dense_weight(weight: Tensor, stack: Tensor, layer: Layer) -> Tensor:
    """The weight in the stack's dtype and the kernels' order, made once for all of a sweep."""
    # Products in TF32 cut their operands off.
    rounds = layer.product == "tf32" and stack.dtype == torch.float32

    def make(weight: Tensor) -> Tensor:
        dense = weight.to(stack.dtype).contiguous(memory_format=_order(weight))
        return rounded_to_tf32(dense) if rounds else dense

    return once(weight, _name(stack.dtype, rounds), make)


def cast_weights(weights: Sequence[Tensor]) -> None:
    """Make `dense_weight`'s results for the weights that autocast casts, all in one launch.

    One launch on a GPU where the weights are in the kernels' order; a launch each elsewhere.
    """
    cast = [weight for weight in weights if layer_dtype(weight) != weight.dtype]
    for dtype in {layer_dtype(weight) for weight in cast}:

        def make(weights: Sequence[Tensor], dtype: torch.dtype = dtype) -> list[Tensor]:
            results = [torch.empty_like(w, dtype=dtype, memory_format=_order(w)) for w in weights]
            torch._foreach_copy_(results, list(weights))
            return results

        provide([w for w in cast if layer_dtype(w) == dtype], _name(dtype), make)


def latent_layer(kind: str, params: tuple[float, ...]) -> Rule:
    """The rule ``(z, weight, bias)`` of `linear_of_latents` and the activation behind it.

    Outside of a sweep these are the library's layer, which autograd differentiates, and the
    activation's kernel. In one, whatever kind it is, the gradient that comes back is that of what
    lies behind the activation: this layer pulls it through, not the one that reads it.

    Args:
        kind: of the activation, as in `fastsfvae.ops.tangent_activation.tangent_activation`.
        params: likewise.
    """
    name = "linear_of_latents"
    library = RULES[name].forward

    def forward(x: Jet, weight: Tensor, bias: Tensor | None = None) -> Jet:
        y = library(x, weight, bias)
        return Jet(*tangent_activation(y.primal, y.tangent, kind, params))

    def lean(private: bool, x: Jet, weight: Tensor, bias: Tensor | None = None) -> Jet:
        return from_stack(stack_latents(x.primal, weight, bias, kind, params))

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


def _order(weight: Tensor) -> torch.memory_format:
    return torch.channels_last if weight.ndim == 4 else torch.contiguous_format


def _name(dtype: torch.dtype, rounds: bool = False) -> str:
    return f"dense {dtype}{' rounded' if rounds else ''}"
