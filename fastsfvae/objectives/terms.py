"""What every training objective takes and returns."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Terms(NamedTuple):
    """One evaluation of an objective.

    Attributes:
        loss: 0-d, to be minimised; the only field that carries a graph.
        objective: ``[B]``, what is maximised, in nats. Named so on purpose: it need not be a lower
            bound of log p(x).
        log_likelihood: ``[B]``, in nats, with the constant -(n/2) log(2 pi c).
        kl: ``[B]``, KL(q(z|x) || N(0, I)) in nats.
        squared_error: ``[B]``, |x - f(z)|^2 at the z that the objective decodes.
    """

    loss: Tensor
    objective: Tensor
    log_likelihood: Tensor
    kl: Tensor
    squared_error: Tensor


def make_terms(
    objective: Tensor, log_likelihood: Tensor, kl: Tensor, squared_error: Tensor
) -> Terms:
    """Take per-image terms ``[B]``; the loss is the negative mean of `objective`."""
    return Terms(
        -objective.mean(),
        objective.detach(),
        log_likelihood.detach(),
        kl.detach(),
        squared_error.detach(),
    )


class Objective(Protocol):
    """An objective of a decoder, built once and called with every batch."""

    def __call__(
        self, x: Tensor, mean: Tensor, log_var: Tensor, *, generator: torch.Generator | None = None
    ) -> Terms:
        """Evaluate on data ``[B, *out]`` and its posterior N(mean, diag(exp(log_var))), ``[B, m]``.

        `generator` is the source of whatever noise the objective draws.
        """
        ...


@runtime_checkable
class Drawing(Protocol):
    """An objective that draws, in two parts: the noise, and what it makes of it."""

    def noise(self, mean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw what a call draws, for posteriors like this mean ``[B, m]``."""
        ...

    def at_noise(self, x: Tensor, mean: Tensor, log_var: Tensor, noise: Tensor) -> Terms:
        """Evaluate at given noise, as `noise` draws it."""
        ...
