"""A trained run with its test images, which are shared out over the processes under torchrun."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from fastsfvae.data.pixels import to_unit
from fastsfvae.ground.progress import counter
from fastsfvae.results.samples import encode
from fastsfvae.training import distributed
from fastsfvae.training.checkpoint import load_saved
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.run import evaluation_generator

# A tensor, or a named tuple of tensors: per image [N], or 0-d and the same for all.
Found = TypeVar("Found")


class Trained(NamedTuple):
    """A run with its test images, on one device.

    Attributes:
        folder: of the run.
        config: what was trained.
        step: optimiser steps done.
        encoder: x -> (mean, log_var).
        decoder: z -> x.
        x: test images in [0, 1], ``[N, C, H, W]``.
        mean: ``[N, m]``.
        log_var: ``[N, m]``, or the covariance's factor ``[N, m, m]``.
        first_image: number of x's first image, where it is a part of the test images.
    """

    folder: Path
    config: TrainConfig
    step: int
    encoder: nn.Module
    decoder: nn.Module
    x: Tensor
    mean: Tensor
    log_var: Tensor
    first_image: int = 0

    @property
    def posterior(self) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
        """Decoder, x, mean and log_var: what all estimators begin with."""
        return self.decoder, self.x, self.mean, self.log_var

    def generator(self) -> torch.Generator:
        """The noise of this run's evaluation, the same at every call."""
        return evaluation_generator(self.config, self.x.device)


def load_trained(folder: str | Path, images: int = 0) -> Trained:
    """Load a run and encode its first `images` test images, all with 0.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: for a folder without a run, missing data or a
            device that is not there, in one line.
    """
    folder = Path(folder)
    saved = load_saved(folder)
    config = saved.config
    device = config.resolve_device()
    encoder, decoder = saved.encoder.to(device), saved.decoder.to(device)
    # Data that are not in the cache yet are put there once.
    with distributed.first_process_first():
        test = config.load_images("test")
    x = to_unit(test[: images or None].to(device))
    mean, log_var = encode(encoder, x)
    return Trained(folder, config, saved.step, encoder, decoder, x, mean, log_var)


def over_images(trained: Trained, measure: Callable[[Trained], Found]) -> Found:
    """Measure this process's share of a run's images; join what the processes have found.

    Args:
        trained: the run with all its images.
        measure: what it returns for some images, per image, depends on no other image.
    """
    count = len(trained.x)
    share = distributed.share(count)
    part = trained._replace(
        x=trained.x[share],
        mean=trained.mean[share],
        log_var=trained.log_var[share],
        first_image=share.start,
    )
    found: Any = measure(part)
    if isinstance(found, Tensor):
        return cast(Found, distributed.join_shares(found, count))
    joined = (distributed.join_shares(t, count) if t.dim() else t for t in found)
    return type(found)(*joined)


def progress(label: str, count: int) -> AbstractContextManager[Callable[[int], None]]:
    """A counter of `count` things that the processes share; process 0 shows its own."""
    return counter(label, count // distributed.size(), shown=distributed.rank() == 0)
