"""Layers on the Triton kernels that take in the activations around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet, from_stack, stack_of
from fastsfvae.jacobian.rules.registry import RULES
from fastsfvae.jacobian.rules.rule import Rule
from fastsfvae.jacobian.rules.tape import once
from fastsfvae.ops._precision import autocast, rounded_to_tf32
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
        return from_stack(stack_layer(layer, stack, _dense(weight, stack, layer), bias))

    def pull(grad: Jet, out: Jet, needs: tuple, x: Jet, weight: Tensor, *_: Any, **__: Any):
        g = stack_of(grad)
        wanted = needs[0], needs[1], any(needs[2:3])
        dense = _dense(weight, g, layer)
        pulled, *others = stack_layer_backward(layer, g, stack_of(x), dense, wanted)
        return None if pulled is None else from_stack(pulled), *others

    return Rule(name, forward, adjoint=pull, lean=lean, fresh=True)


def _dense(weight: Tensor, stack: Tensor, layer: Layer) -> Tensor:
    """The weight in the stack's dtype and the kernels' order, made once for all of a sweep."""
    # Products in TF32 cut their operands off.
    rounds = layer.product == "tf32" and stack.dtype == torch.float32

    def make(weight: Tensor) -> Tensor:
        order = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        dense = weight.to(stack.dtype).contiguous(memory_format=order)
        return rounded_to_tf32(dense) if rounds else dense

    return once(weight, f"dense {stack.dtype} {layer.product}", make)
