"""An objective's training step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae.graphed import GraphedStep, make_graphed_step
from fastsfvae.objectives import Objective, SamplingFree, Terms
from fastsfvae.objectives.sampling_free import terms_of
from fastsfvae.objectives.terms import Drawing


class _AsLoss:
    """An objective as `GraphedStep` calls a loss: whatever it draws is an input of the graph."""

    def __init__(self, objective: Any) -> None:
        self.objective, self.decoder = objective, objective.decoder

    def __call__(
        self, x: Tensor, mean: Tensor, log_var: Tensor, *noise: Tensor, return_terms: bool
    ) -> tuple[Tensor, Terms]:
        if isinstance(self.objective, Drawing):
            terms = self.objective.at_noise(x, mean, log_var, *noise)
        else:
            terms = self.objective(x, mean, log_var)
        return terms.loss, terms


Step = Callable[[Tensor, torch.Generator], Terms]


def capture_objective(
    objective: Objective,
    encoder: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    latent_dim: int,
    autocast: torch.dtype | None,
) -> Step:
    """Capture a step of an objective, to be called with a batch and the source of its noise.

    The noise is drawn outside of the graph, as the step's other inputs are made, so that it is what
    an eager step draws.

    Args:
        objective: any that draws nothing, or a `Drawing`.
        encoder: x -> (mean, log_var).
        optimizer: Adam with capturable=True.
        x: a batch of the size to capture, on the GPU.
        latent_dim: m.
        autocast: as in `make_graphed_step`.
    """
    if isinstance(objective, SamplingFree):
        settings: dict[str, Any] = {"autocast": autocast}
        graphed = make_graphed_step(encoder, objective.loss, optimizer, x, **settings)
        return lambda x, _: terms_of(*graphed(x))

    def noise(x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        if not isinstance(objective, Drawing):
            return ()
        return (objective.noise(x.new_empty(len(x), latent_dim), generator),)

    step: Any = GraphedStep(encoder, _AsLoss(objective), optimizer, autocast, settings=())
    step.capture(x, *noise(x))
    return lambda x, generator: step(x, *noise(x, generator))[1]
