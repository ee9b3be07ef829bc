"""Maxima put back where they were, and pooling windows at given places of the plane."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.indexing import gather
from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.rules.places import numbered, replaced_at
from fastsfvae.jacobian.rules.registry import rule
from fastsfvae.jacobian.rules.shape import flatten, unflatten


def _unpool_rule(spatial: int) -> None:
    @rule(f"max_unpool{spatial}d", composed=True)
    def unpooled(x: Jet, positions: Tensor, size: list[int], *_: Any) -> Jet:
        lead = x.primal.shape[:-spatial]
        places = torch.full((*lead, math.prod(size)), -1, device=positions.device)
        numbers = numbered(x.primal).flatten(-spatial)
        places = places.scatter(-1, positions.flatten(-spatial), numbers)
        return replaced_at(x.primal.new_zeros(*lead, *size), x, places.view(*lead, *size))


def _fractional_rule(spatial: int) -> None:
    operation = getattr(torch.ops.aten, f"fractional_max_pool{spatial}d")

    @rule(f"fractional_max_pool{spatial}d", composed=True)
    def pooled(x: Jet, kernel: Any, size: Any, samples: Tensor) -> tuple[Jet, Tensor]:
        positions = operation(x.primal, kernel, size, samples)[1]
        taken = gather(flatten(x, -spatial), -1, positions.flatten(-spatial))
        return unflatten(taken, -1, list(positions.shape[-spatial:])), positions


for _spatial in (2, 3):
    _unpool_rule(_spatial)
    _fractional_rule(_spatial)
