"""Means over images, with their uncertainty."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from fastsfvae import _checks


class ImageMean(NamedTuple):
    """A mean over images and its standard error (spread over images), as Python floats."""

    mean: float
    standard_error: float


def mean_over_images(values: Tensor) -> ImageMean:
    """Average per-image values ``[N]``; the error is sd / sqrt(N).

    The error is NaN for one image, and where a value is not finite, as the mean then is not.

    Raises:
        ValueError: for no values.
    """
    _not_empty("values", values)
    values = values.double()
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return ImageMean(float(values.mean()), float(error))


def monte_carlo_error(standard_error: Tensor) -> float:
    """Monte Carlo error of a mean over images: sqrt(sum se^2) / N of per-image errors ``[N]``.

    Raises:
        ValueError: for no errors.
    """
    _not_empty("standard_error", standard_error)
    return float(standard_error.double().square().sum().sqrt()) / len(standard_error)


def _not_empty(name: str, values: Tensor) -> None:
    _checks.tensors(**{name: values})
    if values.dim() != 1 or not len(values):
        raise ValueError(f"{name} has shape {tuple(values.shape)}: give [N], one of each image")
