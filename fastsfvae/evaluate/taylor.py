"""How well the linearised decoder predicts the spread of its outputs (paper, Table 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae.evaluate._decode import Decoder, NoiseStream, Progress
from fastsfvae.jacobian.api import decode_with_jacobian

PAPER_SAMPLES = (5, 10, 25, 50, 70, 100, 235)

_REFERENCE_ROWS = 1024


class Agreement(NamedTuple):
    """One way to estimate the covariance of f(z), against the reference.

    Variances that are equal over all outputs, but for rounding, have no correlation: the outputs of
    an image on which the decoder is constant, for one. A mean or a correlation of nothing is NaN.

    Attributes:
        pooled_correlation: Pearson's, of output variances, over all outputs of all images.
        per_image_correlation: Pearson's over the outputs of an image, averaged over the images that
            have one.
        uncorrelated_images: images that have none.
        covariance_error: squared Frobenius norm of the difference of the covariances, averaged over
            images, with the reference's own noise subtracted; NaN where covariances are left out.
        covariance_error_se: its standard error over images; NaN for one image.
        variance_ratio: total estimated variance over total reference variance; NaN where both are
            0.
    """

    pooled_correlation: float
    per_image_correlation: float
    covariance_error: float
    covariance_error_se: float
    variance_ratio: float
    uncorrelated_images: int


class TaylorQuality(NamedTuple):
    """Table 1.

    Attributes:
        taylor: of J diag(h) J^T.
        sampling: number of draws K -> of their covariance, normalised by K - 1.
        equivalent_samples: the K at which sampling has Taylor's covariance error, 1 + v / error
            with v the mean of (K - 1) error_K; infinite where Taylor's error is within the noise.
        reference_noise: expected squared Frobenius error of the reference itself, v / (R - 1).
        reference_samples: R.
        broken_images: images that all numbers leave out, as f or J is not finite at their mean or
            at a draw.
    """

    taylor: Agreement
    sampling: dict[int, Agreement]
    equivalent_samples: float
    reference_noise: float
    reference_samples: int
    broken_images: int


@torch.no_grad()
def taylor_quality(
    decoder: Decoder,
    mean: Tensor,
    log_var: Tensor,
    *,
    samples: Sequence[int] = PAPER_SAMPLES,
    reference_samples: int = 15_000,
    covariance: bool = True,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> TaylorQuality:
    """Compare J diag(h) J^T and small samples with the true covariance of f(z), z ~ q(z|x).

    The truth is a sample of its own, of `reference_samples` draws an image, independent of those
    that are judged. The observation noise c has no part in any of them.

    Args:
        decoder: f.
        mean: posterior means ``[N, m]``.
        log_var: log h, ``[N, m]``.
        samples: numbers of draws that are judged, each at least 2.
        reference_samples: R.
        covariance: whether n x n covariances are compared, not only variances; they take 8 n^2
            bytes.
        generator: source of the noise, on mean's device.
        progress: called with the number of latents decoded since its last call.

    Raises:
        TypeError, ValueError: for inputs that do not fit, in one line.
    """
    _checks.latent(mean, log_var)
    if min(samples, default=2) < 2 or reference_samples < 2:
        raise ValueError(
            f"samples={tuple(samples)} and reference_samples={reference_samples}: a variance needs "
            "at least 2 draws"
        )
    noise = NoiseStream(reference_samples + sum(samples), mean.shape[1], mean, generator)
    columns: tuple[int | str, ...] = ("taylor", *samples)
    truths: list[Tensor] = []
    rounding: list[Tensor] = []
    variances: dict[int | str, list[Tensor]] = {name: [] for name in columns}
    errors: dict[int | str, list[Tensor]] = {name: [] for name in columns}
    for image, (mu, std) in enumerate(zip(mean, torch.exp(0.5 * log_var), strict=True)):
        noise.start(image)
        centre, jacobian = decode_with_jacobian(decoder, mu[None])
        centre = centre.flatten().double()

        def decode(count: int, mu=mu, std=std, centre=centre) -> Tensor:
            """f(z) - f(mu) of `count` draws, ``[count, n]`` float64: small, so nothing cancels."""
            output = decoder(mu + std * noise.take(count))
            if progress is not None:
                progress(count)
            return output.flatten(1).double() - centre

        reference = _Moments(len(centre), centre, covariance)
        for start in range(0, reference_samples, _REFERENCE_ROWS):
            reference.add(decode(min(_REFERENCE_ROWS, reference_samples - start)))
        reference.finish()
        truths.append(reference.variance)
        # What the decoder's own rounding can make of the variance of a constant output.
        rounding.append((torch.finfo(jacobian.dtype).eps * centre.abs().max()).square())
        factors: dict[int | str, Tensor] = {
            "taylor": std[:, None].double() * jacobian[0].flatten(1).double()
        }
        for count in samples:
            draws = decode(count)
            factors[count] = (draws - draws.mean(0)) / math.sqrt(count - 1)
        for name, factor in factors.items():
            variances[name].append(factor.square().sum(0))
            if covariance:
                errors[name].append(reference.squared_distance(factor))
    estimates = {name: torch.stack(rows) for name, rows in variances.items()}
    truth = torch.stack(truths)
    whole = torch.stack([v.isfinite().all(1) for v in (truth, *estimates.values())]).all(0)
    raw = {name: torch.stack(rows)[whole] for name, rows in errors.items() if rows}
    resolution = _Resolution(torch.finfo(mean.dtype).eps, torch.stack(rounding)[whole])

    # error_K = v / (K - 1) + v / (R - 1): the sample's noise and the reference's.
    per_unit = [
        float(raw[k].mean()) / (1 / (k - 1) + 1 / (reference_samples - 1))
        for k in samples
        if k in raw
    ]
    scale = sum(per_unit) / len(per_unit) if per_unit else math.nan
    reference_noise = scale / (reference_samples - 1)
    agreements = {
        name: _agreement(rows[whole], truth[whole], raw.get(name), reference_noise, resolution)
        for name, rows in estimates.items()
    }
    taylor, sampling = agreements["taylor"], {k: agreements[k] for k in samples}
    error = taylor.covariance_error
    equivalent = 1 + scale / error if error > 0 else math.inf if error <= 0 else math.nan
    broken = int((~whole).sum())
    return TaylorQuality(taylor, sampling, equivalent, reference_noise, reference_samples, broken)


class _Moments:
    """Running mean and covariance of rows ``[k, n]``."""

    def __init__(self, n: int, like: Tensor, covariance: bool) -> None:
        self._count = 0
        self._sum = like.new_zeros(n)
        self._square = like.new_zeros(n)
        self._outer = like.new_zeros(n, n) if covariance else None

    def add(self, rows: Tensor) -> None:
        self._count += len(rows)
        self._sum += rows.sum(0)
        self._square += rows.square().sum(0)
        if self._outer is not None:
            self._outer.addmm_(rows.T, rows)

    def finish(self) -> None:
        mean, k = self._sum / self._count, self._count
        self.variance = (self._square - k * mean.square()) / (k - 1)
        if self._outer is not None:
            self._outer.addr_(mean, mean, alpha=-k).div_(k - 1)
            self._norm = self._outer.square().sum()

    def squared_distance(self, factor: Tensor) -> Tensor:
        """|F^T F - C|_F^2 for F ``[k, n]``, without forming F^T F."""
        assert self._outer is not None
        cross = ((factor @ self._outer) * factor).sum()
        return (factor @ factor.T).square().sum() - 2 * cross + self._norm


class _Resolution(NamedTuple):
    """What counts as rounding: a relative one of variances, and an absolute one of each image."""

    relative: float
    absolute: Tensor


def _agreement(
    variance: Tensor,
    reference: Tensor,
    errors: Tensor | None,
    reference_noise: float,
    resolution: _Resolution,
) -> Agreement:
    """Of variances ``[N, n]``, and of squared errors ``[N]``."""
    per_image = _pearson(variance, reference, resolution)
    pooled = _pearson(
        variance.reshape(1, -1),
        reference.reshape(1, -1),
        resolution._replace(absolute=resolution.absolute.sum(0, keepdim=True)),
    )
    error, spread = math.nan, math.nan
    if errors is not None:
        error = float(errors.mean()) - reference_noise
        if len(errors) > 1:
            spread = float(errors.std()) / math.sqrt(len(errors))
    return Agreement(
        pooled_correlation=float(pooled),
        per_image_correlation=float(per_image.nanmean()),
        covariance_error=error,
        covariance_error_se=spread,
        variance_ratio=float(variance.sum() / reference.sum()),
        uncorrelated_images=int(per_image.isnan().sum()),
    )


def _pearson(a: Tensor, b: Tensor, resolution: _Resolution) -> Tensor:
    """Pearson's correlation of the rows of ``[k, n]``; NaN where one of them is constant."""
    root = math.sqrt(a.shape[1])
    spreads = [t - t.mean(1, keepdim=True) for t in (a, b)]
    norms = [t.norm(dim=1) for t in spreads]
    constant = torch.zeros_like(norms[0], dtype=torch.bool)
    for t, norm in zip((a, b), norms, strict=True):
        constant |= norm <= resolution.relative * t.norm(dim=1) + root * resolution.absolute
    correlation = (spreads[0] * spreads[1]).sum(1) / (norms[0] * norms[1])
    return correlation.masked_fill(constant, math.nan)
