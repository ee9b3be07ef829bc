"""Table 1: quality of the Taylor series approximation (4.1)."""

from __future__ import annotations

from collections.abc import Sequence

from fastsfvae.evaluate.taylor import PAPER_SAMPLES
from fastsfvae.reproduce.cells import Cell, Experiment, Options, Published, Result
from fastsfvae.reproduce.figures import log_counts, row_of_panels, tidy
from fastsfvae.reproduce.images import ASSUMPTIONS, image_protocol
from fastsfvae.reproduce.measures import Covariances
from fastsfvae.training.config import TrainConfig

_COLUMNS = ("Taylor", *(f"K={count}" for count in PAPER_SAMPLES))
# Data set -> row -> Taylor, then the numbers of samples.
_PAPER: dict[str, dict[str, tuple[float, ...]]] = {
    "celeba": {
        "variance correlation": (0.967, 0.680, 0.816, 0.912, 0.955, 0.966, 0.976, 0.988),
        "covariance error": (297, 17446, 7779, 2951, 1456, 1033, 737, 302),
    },
    "chairs": {
        "variance correlation": (0.975, 0.686, 0.819, 0.914, 0.953, 0.966, 0.976, 0.988),
    },
}


def _cells(options: Options) -> list[Cell]:
    cells = []
    for data in options.data_sets("celeba", "chairs", "digits"):
        protocol = image_protocol(options, data)
        config = TrainConfig(
            **protocol.settings, method="sampling", latent_dim=8 if options.quick else 16
        )
        # The paper leaves the chairs' covariances out.
        measure = Covariances(covariance=data != "chairs")
        if options.quick:
            measure = Covariances(images=5, reference_samples=2000)
        paper = {
            f"{column}, {row}": {protocol.steps: Published(value)}
            for row, values in _PAPER.get(data, {}).items()
            for column, value in zip(_COLUMNS, values, strict=True)
        }
        cells.append(Cell(data, config, measure, (protocol.steps,), paper=paper))
    return cells


def _draw(results: Sequence[Result]):
    figure, panels = row_of_panels(len(results), 4.6, 3.4)
    for axes, result in zip(panels, results, strict=True):
        measured = result.measured(result.steps[-1])
        key = "variance correlation"
        values = [measured[f"{column}, {key}"] for column in _COLUMNS[1:]]
        axes.plot(PAPER_SAMPLES, values, marker=".", label="K samples")
        axes.axhline(measured[f"Taylor, {key}"], color="C1", label="Taylor")
        paper = _PAPER.get(result.cell.config.data, {}).get(key)
        if paper:
            axes.plot(PAPER_SAMPLES, paper[1:], "k_", markersize=10, label="paper, K samples")
            axes.axhline(paper[0], color="black", linestyle=":", label="paper, Taylor")
        log_counts(axes, PAPER_SAMPLES)
        tidy(axes, f"{result.cell.name}: correlation of pixel variances", "samples K")
        axes.legend(fontsize=8, frameon=False)
    return figure


TABLE1 = Experiment(
    title="Taylor expansion against K samples, of a sampling VAE",
    cells=_cells,
    draw=_draw,
    assumptions=(
        "how many images are judged is not stated: 100",
        "the Frobenius norm of the paper is the squared one: (K - 1) times its column is constant",
        *ASSUMPTIONS,
    ),
)
