"""Latents whose tangents are a user's own directions instead of the unit vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.rules.registry import adjoint, always, rule


@torch.library.custom_op("fastsfvae::directed", mutates_args=())
def directed(steps: Tensor, z: Tensor, directions: Tensor) -> Tensor:
    """Z + sum_i steps_i directions_i at steps = 0, as one operation of a trace.

    Args:
        steps: zeros ``[B, k]``, which a plan takes for its latents.
        z: ``[B, m]``.
        directions: ``[B, k, m]``.
    """
    return z.clone()


@directed.register_fake
def _(steps, z, directions):
    return torch.empty_like(z)


@rule("fastsfvae.directed.default", several=True)
def _directed(steps: Jet, z: Tensor, directions: Tensor) -> Jet:
    """The tangents by the steps are the directions, which are constants no more."""
    return Jet(z, directions.transpose(0, 1))


@adjoint("fastsfvae.directed.default", covers=always)
def _directed_adjoint(grad: Jet, out: Jet, needs: tuple, steps: Jet, z: Tensor, directions: Tensor):
    return None, grad.primal, grad.tangent.transpose(0, 1)
