"""Derivatives along a user's own directions: the same engine, on latents that move along them.

With directions V ``[k, m]`` of a sample, t -> f(z + t V) has k latents, and its Jacobian at t = 0
is J V. So whatever takes a decoder and its latents (a plan, a sweep, a Gram) takes this function
and zeros, with z and V as two more inputs; they have gradients as any further input has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fastsfvae.jacobian.validate import LATENTS, Derived, unwrap


class Directed(Derived):
    """The function of the module's docstring."""

    def forward(self, steps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call the decoder on the latents that the steps lead to."""
        return _moved(self.inner, steps, *args, **kwargs)


class Asked(NamedTuple):
    """What to differentiate: ``decoder(z, *args, **kwargs)`` with the further inputs as they are.

    Attributes:
        decoder: of the steps along the tangents.
        z: zeros ``[B, k]``.
        kwargs: by name.
    """

    decoder: Callable[..., Tensor]
    z: Tensor
    kwargs: dict[str, Any]


def along(
    decoder: Callable[..., Tensor], z: Tensor, tangents: Tensor, kwargs: dict[str, Any]
) -> Asked:
    """What to differentiate for the derivatives of a decoder along tangents ``[k, B, m]``.

    Raises:
        TypeError: a wrapped decoder.
    """
    target, kwargs = unwrap(decoder, kwargs)
    if isinstance(target, nn.Module):
        target = Directed(target)
    else:
        target = functools.partial(_moved, target)
    steps, inputs = directed_inputs(z, tangents)
    return Asked(target, steps, {**kwargs, **inputs})


def directed_inputs(z: Tensor, tangents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The latents of a `Directed` decoder, zeros ``[B, k]``, and its own two inputs by name."""
    steps = z.new_zeros(z.shape[0], tangents.shape[0])
    return steps, {LATENTS: z, "_directions": tangents.transpose(0, 1)}


def _moved(
    decoder: Callable[..., Tensor],
    steps: Tensor,
    *args: Any,
    _latents: Tensor,
    _directions: Tensor,
    **kwargs: Any,
) -> Tensor:
    if get_proxy_mode() is None:
        z = _latents + (steps.unsqueeze(-1) * _directions).sum(1)
    else:
        # Late: rules are not imported before the first trace.
        from fastsfvae.jacobian.rules.directed import directed

        z = directed(steps, _latents, _directions)
    return decoder(z, *args, **kwargs)
