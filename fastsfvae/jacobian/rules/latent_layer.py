"""A linear layer of the latents on a Triton kernel that takes in the activation behind it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet, from_stack, stack_of
from fastsfvae.jacobian.rules.registry import RULES
from fastsfvae.jacobian.rules.rule import Rule
from fastsfvae.ops.latent_layer import stack_latents, stack_latents_backward
from fastsfvae.ops.tangent_activation import tangent_activation


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
