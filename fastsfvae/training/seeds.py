"""Seeds and the order of the images: every random number is a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from torch import Tensor

# Streams of random numbers that must not resemble each other under one seed.
WEIGHTS, ORDER, NOISE, EVALUATION, LAYERS = range(5)


def mix_seed(seed: int, stream: int, index: int) -> int:
    """Give neighbouring seeds, streams and indices unrelated generators."""
    (state,) = np.random.SeedSequence((seed, stream, index)).generate_state(1, np.uint64)
    return int(state >> np.uint64(1))


def iterate_orders(
    images: int, batch_size: int, seed: int, first_step: int = 0, rows: slice = slice(None)
) -> Iterator[Tensor]:
    """Yield what is left of each epoch: the numbers ``[steps, B]`` of the images of its steps.

    Each epoch is a permutation of the images that (seed, epoch) determines; its incomplete last
    batch is left out.

    Args:
        images: how many there are.
        batch_size: images per step.
        seed: the run's.
        first_step: steps that are left out.
        rows: the part of each batch that is wanted.
    """
    per_epoch = images // batch_size
    first_epoch, done = divmod(first_step, per_epoch)
    for epoch in count(first_epoch):
        generator = torch.Generator().manual_seed(mix_seed(seed, ORDER, epoch))
        order = torch.randperm(images, generator=generator)[: per_epoch * batch_size]
        yield order.unflatten(0, (per_epoch, batch_size))[done:, rows]
        done = 0
