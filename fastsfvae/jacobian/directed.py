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

from fastsfvae import _checks
from fastsfvae.jacobian.validate import Derived, check_latents, unwrap

class Directed(Derived):
    """The function of the module's docstring."""

    def forward(self, steps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call the decoder on the latents that the steps lead to."""
        return _moved(self.inner, steps, *args, **kwargs)


class Asked(NamedTuple):
    """What to differentiate: ``decoder(z, *args, **kwargs)`` with the further inputs as they are.

    Attributes:
        decoder: of the latents z.
        z: ``[B, m]``, or zeros ``[B, k]``.
        kwargs: by name.
    """

    decoder: Callable[..., Tensor]
    z: Tensor
    kwargs: dict[str, Any]


def along(
    decoder: Callable[..., Tensor], z: Tensor, tangents: Tensor | None, kwargs: dict[str, Any]
) -> Asked:
    """What to differentiate for the derivatives of a decoder along tangents ``[k, B, m]``.

    Without tangents that is the decoder itself, and its derivatives are J.

    Raises:
        TypeError: a wrapped decoder.
    """
    if tangents is None:
        return Asked(decoder, z, kwargs)
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
    return steps, {"_latents": z, "_directions": tangents.transpose(0, 1)}


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


def check_tangents(tangents: Tensor | None, z: Tensor) -> None:
    """Refuse what are no directions ``[k, B, m]`` of latents ``[B, m]``; None stands for none.

    Raises:
        TypeError: no floating-point tensor, or of another dtype than z.
        ValueError: another shape or device.
    """
    check_latents(z)
    if tangents is None:
        return
    _checks.floating("tangents", tangents)
    if tangents.dtype != z.dtype:
        raise TypeError(f"tangents are {tangents.dtype} but z is {z.dtype}: convert one of them")
    if tangents.dim() != 3 or tangents.shape[1:] != z.shape or not tangents.shape[0]:
        B, m = z.shape
        raise ValueError(
            f"tangents have shape {tuple(tangents.shape)}: give [k, B, m] with k >= 1 and the "
            f"[B, m] of z, [{B}, {m}]"
        )
    _checks.same_device(("z", z), ("tangents", tangents))
