"""What the numbers of a run, or of several, come to, in one line."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastsfvae.evaluate import ImageMean, PosteriorCollapse, TaylorQuality

# An image's log ML rests on too few weights where fewer of them are effective.
FEW_EFFECTIVE = 10
# And its stated error is too small where fewer than these are.
ENOUGH_EFFECTIVE = 30
# And the mean over images is not worth its name where that holds for so many of them.
_TOO_MANY = 0.1


def of_evaluation(
    log_ml: ImageMean,
    unresolved: int,
    images: int,
    weights: str,
    collapse: PosteriorCollapse,
    taylor: TaylorQuality | None,
    understated: int = 0,
) -> str:
    """Say it of one run.

    Args:
        log_ml: of the test images, in nats.
        unresolved: images with fewer than `FEW_EFFECTIVE` effective weights.
        images: test images in all.
        weights: number and origin of the importance weights.
        collapse: of the latent dimensions.
        taylor: of the linearised decoder; None where it was not compared.
        understated: images with fewer than `ENOUGH_EFFECTIVE` effective weights.
    """
    parts = [
        f"log ML {_with_error(log_ml)} nats on {images:,} test images ({weights})"
        f"{_caution(log_ml.mean, unresolved, images, understated)}",
        f"{collapse.active} of {collapse.latent_dim} latent dimensions active",
    ]
    if taylor is not None and math.isfinite(taylor.taylor.pooled_correlation):
        found = taylor.taylor
        parts.append(
            f"the linearisation predicts the output variances to r = "
            f"{found.pooled_correlation:.3f} and their sum to {found.variance_ratio:.0%}"
        )
    return "; ".join(parts)


def of_errors(
    names: Sequence[str], differences: Sequence[ImageMean], images: int, reason: str
) -> str:
    """Say it of several runs, one of which has no density of x.

    Args:
        names: of the runs; the first is what the others are compared with.
        differences: of their errors at the mean from the first's.
        images: test images.
        reason: why there is no density.
    """
    first, *others = names
    parts = [
        f"{name} has a squared error at the mean {_with_error(difference)} from that of {first}"
        for name, difference in zip(others, differences, strict=True)
    ]
    return f"{'; '.join(parts)}, on {images:,} test images; {reason}"


def of_comparison(
    names: Sequence[str],
    differences: Sequence[ImageMean],
    unresolved: Sequence[int],
    images: int,
    weights: str,
    understated: int = 0,
    seed_errors: Sequence[float] = (),
) -> str:
    """Say it of runs, or groups of runs, against the first of them.

    Args:
        names: of the runs.
        differences: in log ML, of each run but the first from the first, in nats.
        unresolved: as in `of_evaluation`, of each run.
        images: test images.
        weights: as in `of_evaluation`.
        understated: as in `of_evaluation`, the most of a run.
        seed_errors: standard errors over seeds of the differences, in nats; NaN where there is
            none. The larger error is stated.
    """
    first, *others = names
    parts = []
    for i, (name, difference) in enumerate(zip(others, differences, strict=True)):
        over = "images, not over seeds"
        if i < len(seed_errors) and math.isfinite(seed_errors[i]):
            over = "images"
            if seed_errors[i] > difference.standard_error:
                over, difference = "seeds", difference._replace(standard_error=seed_errors[i])
        error = f" (± over {over})" if math.isfinite(difference.standard_error) else ""
        parts.append(f"log ML of {name} - {first}: {_with_error(difference, '+')} nats{error}")
    worst = max(unresolved)
    caution = _caution(min(d.mean for d in differences), worst, images, understated)
    return f"{'; '.join(parts)}; {images:,} test images ({weights}){caution}"


def doubt(smallest: float) -> str:
    """Say of an image's effective weights where they are too few for the errors to hold."""
    if smallest >= ENOUGH_EFFECTIVE:
        return ""
    return f"; below {ENOUGH_EFFECTIVE} an image's error and bias are too small"


def _with_error(value: ImageMean, sign: str = "") -> str:
    mean, error = value
    return f"{mean:{sign},.1f}" + (f" ± {error:.1f}" if math.isfinite(error) else "")


def _caution(mean: float, unresolved: int, images: int, understated: int) -> str:
    if not math.isfinite(mean):
        return ", NOT finite: an image decodes to infinity or NaN"
    few, between = unresolved, understated - unresolved
    parts = [f"{few:,} of them with fewer than {FEW_EFFECTIVE} effective weights"] if few else []
    if between > 0:
        more = "more" if few else "of them"
        parts.append(
            f"{between:,} {more} with fewer than {ENOUGH_EFFECTIVE} effective weights, where the "
            "error is too small"
        )
    if not parts:
        return ""
    text = ", ".join(parts)
    return f", NOT to be trusted: {text}" if unresolved > _TOO_MANY * images else f", {text}"
