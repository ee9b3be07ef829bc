"""The sampling-free objective with its cotangents, from sums of a Jacobian, on the Triton kernel.

The kernel's header has the formulas; the objective in plain torch is `fastsfvae.likelihoods`. No
autograd and no compiler sees these functions, so they call the launchers themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastsfvae._ranges import ranged
from fastsfvae.kernels._contract import WOODBURY_MAX_M
from fastsfvae.ops import _library

if TYPE_CHECKING:
    from fastsfvae.kernels.elbo import Objective

Sums = tuple[Tensor, Tensor, Tensor]


class Parts(NamedTuple):
    """Sums over parts of n.

    Attributes:
        sums: float32 ``(G [S, B, m, m], p [S, B, m], rr [S, B])`` with m <= 64.
        redo: the same sums in float64, of the samples that its argument marks, bool ``[B]``; None
            where what they are made of is rounded, so that a lost sample stays lost.
    """

    sums: Sums
    redo: Callable[[Tensor], Sums] | None


@ranged("gram")
def jacobian_parts(J: Tensor, r: Tensor) -> Parts | None:
    """The parts of a Jacobian that was written, None where m is above what the kernel holds.

    Args:
        J: ``[B, m, n]``; float32, bfloat16 or float16.
        r: ``[B, n]``, one of the same dtypes.

    Raises:
        RuntimeError: a device that Triton cannot reach.
        TypeError: another dtype.
        ValueError: float64.
    """
    _library.require_triton(J)
    if J.shape[1] > WOODBURY_MAX_M:
        return None
    from fastsfvae.kernels.gram_project import gram_project_partials
    from fastsfvae.kernels.woodbury_float64 import gram_float64

    # Rounded tangents cannot be rescued.
    redo = functools.partial(gram_float64, J, r) if J.dtype == torch.float32 else None
    return Parts(gram_project_partials(J, r), redo)


@ranged("solve")
def elbo_of_parts(
    parts: Parts, inputs: Sequence[Tensor], weights: Tensor, n: int, likelihood: str
) -> Objective:
    """The objective's terms and cotangents: one launch, and one more for the float64 rescue.

    Args:
        parts: of a chunk's samples.
        inputs: mean ``[B, m]``, log h ``[B, m]``, c, gamma and the weight of the KL divergence, the
            last three 0-d; float32.
        weights: of the samples in the loss, float32 ``[B]``.
        n: elements of one sample's output.
        likelihood: one of the four.

    Raises:
        TypeError: an input that is not float32.
    """
    from fastsfvae.kernels.elbo import Latents, elbo, elbo_again

    latents = Latents(*inputs, weights)
    found = elbo(parts.sums, latents, n, likelihood)
    if parts.redo is not None and likelihood != "expected":
        elbo_again(parts.redo(found.lost), latents, n, likelihood, found)
    return found
