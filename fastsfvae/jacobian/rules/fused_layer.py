"""Layers on the Triton kernels that take in the activation in front of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet, from_stack, stack_of
from fastsfvae.jacobian.rules.registry import RULES
from fastsfvae.jacobian.rules.rule import Rule
from fastsfvae.jacobian.rules.tape import once
from fastsfvae.ops._precision import autocast
from fastsfvae.ops.tangent_activation import tangent_activation
from fastsfvae.ops.tangent_layer import Layer, stack_layer, stack_layer_backward


def fused_layer(name: str, layer: Layer) -> Rule:
    """The rule ``(x, weight, bias, *geometry)`` of a layer on phi(x).

    Outside of a sweep it is the activation's kernel and the library's layer, which autograd
    differentiates.

    Args:
        name: the ATen operation, "linear", "conv2d" or "conv_transpose2d".
        layer: its geometry, and phi.
    """
    library = RULES[name].forward

    def forward(x: Jet, *args: Any, **kwargs: Any) -> Jet:
        if layer.kind != "none":
            x = Jet(*tangent_activation(x.primal, x.tangent, layer.kind, layer.params))
        return library(x, *args, **kwargs)

    def lean(private: bool, x: Jet, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any):
        stack = autocast(stack_of(x))
        return from_stack(stack_layer(layer, stack, _dense(weight, stack), bias))

    def pull(grad: Jet, out: Jet, needs: tuple, x: Jet, weight: Tensor, *_: Any, **__: Any):
        g = stack_of(grad)
        wanted = needs[0], needs[1], any(needs[2:3])
        pulled, *others = stack_layer_backward(layer, g, stack_of(x), _dense(weight, g), wanted)
        return None if pulled is None else from_stack(pulled), *others

    return Rule(name, forward, adjoint=pull, lean=lean, fresh=True)


def _dense(weight: Tensor, stack: Tensor) -> Tensor:
    """The weight in the stack's dtype and the kernels' order, made once for all of a sweep."""

    def make(weight: Tensor) -> Tensor:
        order = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        return weight.to(stack.dtype).contiguous(memory_format=order)

    return once(weight, f"dense {stack.dtype}", make)
