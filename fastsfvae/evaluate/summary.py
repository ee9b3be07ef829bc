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
    """Average per-image values ``[N]``; the error is sd / sqrt(N), NaN for one image."""
    _checks.tensors(values=values)
    values = values.double()
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return ImageMean(float(values.mean()), float(error))


def monte_carlo_error(standard_error: Tensor) -> float:
    """Monte Carlo error of a mean over images: sqrt(sum se^2) / N of per-image errors ``[N]``."""
    _checks.tensors(standard_error=standard_error)
    return float(standard_error.double().square().sum().sqrt()) / len(standard_error)
