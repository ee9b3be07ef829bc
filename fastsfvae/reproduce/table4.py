"""Table 4: posterior collapse (4.4, B.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from fastsfvae.models import Init, OutputActivation
from fastsfvae.reproduce.cells import Cell, Experiment, Options, Published, Result
from fastsfvae.reproduce.figures import Panel, dots
from fastsfvae.reproduce.measures import Collapse
from fastsfvae.reproduce.tables import grid, summarise
from fastsfvae.training.config import TrainConfig

_COLLAPSE, _ERROR, _KL = "collapse %", "error", "KL"
_PAPER: dict[str, dict[str, dict[int, Published]]] = {
    "sampling": {
        _COLLAPSE: {100: Published(99.0, 1.5), 1000: Published(60.0, 15.7)},
        _ERROR: {100: Published(172.5, 3.0), 1000: Published(46.2, 12.4)},
        _KL: {100: Published(0.1, 0.1), 1000: Published(4.8, 1.3)},
    },
    "sampling-free": {
        _COLLAPSE: {100: Published(28.4, 4.2), 1000: Published(0.6, 0.6)},
        _ERROR: {100: Published(38.7, 0.5), 1000: Published(9.8, 0.4)},
        _KL: {100: Published(2.9, 0.1), 1000: Published(4.2, 0.1)},
    },
}
# The paper does not say which of these its error is.
_ERRORS = (
    "error at the mean",
    "error, sampled",
    "error at the mean / c",
    "error, sampled / c",
)
_OBJECTIVES: dict[str, dict[str, Any]] = {
    "sampling": {"method": "sampling"},
    "precision": {"method": "sampling-free", "likelihood": "precision"},
    "mixture": {"method": "sampling-free", "likelihood": "mixture"},
    "expected": {"method": "sampling-free", "likelihood": "expected"},
}
_OTHER_GAMMAS = {
    f"precision {gamma:g}".replace("0.", "."): _OBJECTIVES["precision"] | {"gamma": gamma}
    for gamma in (0.67, 0.8, 0.85, 0.9, 0.95)
}
_Reading = tuple[OutputActivation, Init]
_READINGS: tuple[_Reading, ...] = (
    ("none", "torch"),
    ("none", "kaiming"),
    ("sigmoid", "torch"),
    ("sigmoid", "kaiming"),
)
_SHOWN = {"none": "identity", "sigmoid": "sigmoid"}
_FITS_SAMPLING: _Reading = ("sigmoid", "kaiming")


def _paper(data: str, method: str) -> Mapping[str, Mapping[int, Published]]:
    """The printed values, which are MNIST's."""
    if data not in ("digits", "mnist"):
        return {}
    paper = _PAPER[method]
    return {_COLLAPSE: paper[_COLLAPSE], _KL: paper[_KL]} | dict.fromkeys(_ERRORS, paper[_ERROR])


def _cells(options: Options) -> list[Cell]:
    # Full batch: an epoch is a step.
    images, at, seeds = (200, (10, 40), 1) if options.quick else (1000, (100, 1000), 10)
    (data,) = options.data_sets("digits")
    cells = []
    for name, (output, init) in _tried(options.quick):
        config = TrainConfig(
            **(_OBJECTIVES | _OTHER_GAMMAS)[name],
            **options.place(data),
            model="mlp",
            latent_dim=50 if options.quick else 200,
            train_images=images,
            batch_size=images,
            lr=1e-3,
            output_activation=output,
            init=init,
        )
        paper = _paper(data, config.method)
        name = f"{name}, {_SHOWN[output]}, {init}"
        cells.append(Cell(name, config, Collapse(), at, seeds, paper))
    return cells


def _tried(quick: bool) -> list[tuple[str, _Reading]]:
    """The objectives, each with the readings that it is run under."""
    if quick:
        # What torch would do by itself, and what fits the paper's sampling row.
        return list(product(("sampling", "precision"), (("none", "torch"), _FITS_SAMPLING)))
    return [*product(_OBJECTIVES, _READINGS), *product(_OTHER_GAMMAS, (_FITS_SAMPLING,))]


def _reading(results: Sequence[Result]) -> str:
    """Which printed values each reading of what the paper leaves open fits."""
    if not any(result.cell.paper for result in results):
        return ""
    columns = (_COLLAPSE, *_ERRORS, _KL)
    fits: dict[tuple[int, str], set[str]] = {}
    for row in summarise(results):
        found = fits.setdefault((row.step, row.cell), set())
        if row.fits:
            found.add(row.quantity)
    rows = (
        [cell, f"{step:,}", *("x" if column in found else "" for column in columns)]
        for (step, cell), found in fits.items()
    )
    # A reading's output, initial weights and error -> the paper's rows that it fits whole.
    whole: dict[str, set[str]] = {}
    for (step, cell), found in fits.items():
        objective, _, reading = cell.partition(", ")
        for error in _ERRORS:
            if {_COLLAPSE, error, _KL} <= found:
                method = "sampling" if objective == "sampling" else "sampling-free"
                whole.setdefault(f"{reading}, {error} after {step:,} steps", set()).add(method)
    both = "; ".join(reading for reading, methods in whole.items() if len(methods) == 2)
    lines = [
        "Printed values that a cell fits (x), within the paper's spread and ours together:",
        "",
        *grid(["cell", "steps", *columns], rows),
        "",
        f"Readings that fit the paper's sampling row and its sampling-free one: {both or 'none'}.",
    ]
    return "\n".join(lines)


def _draw(results: Sequence[Result]):
    panels = [
        Panel(_COLLAPSE, "collapsed dimensions (%)"),
        Panel(_ERRORS[0], "squared error at the mean"),
        Panel(_ERRORS[1], "squared error, sampled"),
        Panel(_KL, "KL (nats)"),
    ]
    return dots(results, panels)


TABLE4 = Experiment(
    title="Posterior collapse: m = 200, 1,000 images, full batch",
    cells=_cells,
    draw=_draw,
    reading=_reading,
    columns=(_COLLAPSE, *_ERRORS, _KL),
    assumptions=(
        "the output's activation and the initial weights are not stated: identity and sigmoid, "
        "torch's own and He-normal with zero bias, each pair a row",
        "the reconstruction error is not defined: at the mean and sampled, as a sum of squares and "
        "over c, each a column beside the same printed value",
        "which images it is measured on is not stated: the 1,000 training images",
        "gamma is not stated for this table: 0.5, the paper's canonical choice; others "
        "beside it under the output and weights that fit the sampling row",
        "pixels in [0, 1], c = 0.5, beta = 1; the first 1,000 training images, of the bundled "
        "digits where no other set is named",
        "the paper's values are of MNIST, and stand beside digits alone",
        "± is the standard deviation over seeds",
    ),
)
