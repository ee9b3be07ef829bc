"""Tables 2 and 5, Figures 4 and C.1: FID and log ML on CelebA and 3D Chairs (4.2, C.1, C.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastsfvae.reproduce.cells import Cell, Experiment, Options, Published, Result
from fastsfvae.reproduce.figures import Panel, dots, row_of_panels, tidy
from fastsfvae.reproduce.images import ASSUMPTIONS, image_protocol
from fastsfvae.reproduce.measures import Likelihoods, Quality
from fastsfvae.reproduce.runner import stored_records
from fastsfvae.reproduce.runtime import measured_ratios
from fastsfvae.reproduce.tables import summarise
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.methods import Method

_METHODS: tuple[Method, ...] = ("sampling-free", "sampling")
# Sampling-free steps, of 10^6, that took the time of sampling's 10^6 there.
_PAPER_BUDGET = 650_000
_PAPER_RATIO = 1_000_000 / _PAPER_BUDGET
# Data set -> method or budget -> quantity, with Table 5's standard deviations.
_PAPER: dict[str, dict[str, dict[str, Published]]] = {
    "celeba": {
        "sampling-free": {"FID": Published(95.79, 0.33), "log ML": Published(-7244.9, 0.6)},
        "sampling": {"FID": Published(99.66, 0.65), "log ML": Published(-7245.3, 0.1)},
        "matching": {"FID": Published(98.00, 1.79), "log ML": Published(-7247.1, 0.4)},
    },
    "chairs": {
        "sampling-free": {"FID": Published(51.96, 1.75), "log ML": Published(-7078.8, 0.1)},
        "sampling": {"FID": Published(53.53, 1.05), "log ML": Published(-7078.9, 0.0)},
        "matching": {"FID": Published(54.21, 1.63), "log ML": Published(-7079.6, 0.1)},
    },
}


def step_ratios(options: Options, out: Path) -> dict[str, float]:
    """Of each data set, the ratio of step times that its matching budget follows from.

    Args:
        options: of the runs that are looked for.
        out: the folder of results; what a run in it began with comes before what was measured.
    """
    cells = [cell for cell in _table2_cells(options) if cell.config.method == "sampling-free"]
    kept = {
        cell.config.data: record["step_ratio"]
        for cell, record in stored_records(cells, out)
        if "step_ratio" in record
    }
    return measured_ratios(options, out) | kept


def _paper(data: str, method: str, at: Sequence[int]) -> Mapping[str, Mapping[int, Published]]:
    """The paper's values, those of its matching budget beside the earlier of two steps."""
    printed = _PAPER.get(data, {})
    paper = {quantity: {at[-1]: value} for quantity, value in printed.get(method, {}).items()}
    if len(at) == 2:
        steps = None if at[0] == _PAPER_BUDGET else _PAPER_BUDGET
        for quantity, value in printed.get("matching", {}).items():
            paper[quantity][at[0]] = value._replace(steps=steps)
    return paper


def _cell(options: Options, data: str, method: Method, m: int, matching: bool) -> Cell:
    protocol = image_protocol(options, data)
    config = TrainConfig(**protocol.settings, method=method, latent_dim=m)
    likelihoods = Likelihoods(samples=50_000, images=1000)
    if options.quick:
        likelihoods = Likelihoods(samples=200, images=100)
    steps = options.steps or protocol.steps
    ratio = options.step_ratios.get(data, _PAPER_RATIO)
    budget = max(1, round(steps / ratio))
    # A step that is hardly slower than sampling's leaves no earlier one.
    at = (budget, steps) if matching and budget < steps else (steps,)
    # The paper's values belong to its own m and number of steps.
    printed = m == 16 and steps == protocol.steps
    return Cell(
        f"{data}, {method}, m={m}",
        config,
        Quality(likelihoods, options.inception),
        at,
        3,
        _paper(data, method, at) if printed else {},
        step_ratio=ratio if matching else None,
    )


def _table2_cells(options: Options) -> list[Cell]:
    return [
        _cell(options, data, method, 16, matching=method == "sampling-free")
        for data in options.data_sets("celeba", "chairs")
        for method in _METHODS
    ]


def _figure_cells(options: Options, own: str) -> list[Cell]:
    return [
        _cell(options, data, method, m, matching=m == 16 and method == "sampling-free")
        for data in options.data_sets(own)
        for m in image_protocol(options, data).sizes
        for method in _METHODS
    ]


def _draw_sizes(results: Sequence[Result]):
    """Mean over runs against m, from their minimum to their maximum."""
    last = {result.cell.name: result.steps[-1] for result in results}
    data = results[0].cell.config.data
    quantities = [q for q in ("FID", "log ML") if q in results[0].measured(results[0].steps[-1])]
    figure, panels = row_of_panels(len(quantities), 4.6, 3.4)
    for axes, quantity in zip(panels, quantities, strict=True):
        for method in _METHODS:
            points: dict[int, list[float]] = {}
            for result in results:
                if result.cell.config.method == method and last[result.cell.name] in result.steps:
                    value = result.measured(last[result.cell.name])[quantity]
                    points.setdefault(result.cell.config.latent_dim, []).append(value)
            means = [sum(values) / len(values) for values in points.values()]
            low = [mean - min(v) for mean, v in zip(means, points.values(), strict=True)]
            high = [max(v) - mean for mean, v in zip(means, points.values(), strict=True)]
            axes.errorbar(
                list(points), means, yerr=(low, high), marker=".", capsize=3, label=method
            )
        tidy(axes, f"{data}, {quantity}: mean, minimum, maximum over runs", "latent dimensions m")
    panels[0].legend(fontsize=8, frameon=False)
    return figure


def _budgets(results: Sequence[Result]) -> str:
    """Which budget each data set's earlier step is, and where its ratio comes from."""
    lines = {}
    for result in results:
        cell = result.cell
        if cell.step_ratio is None or len(cell.at) == 1:
            continue
        of_paper = cell.step_ratio == _PAPER_RATIO
        source = "the paper's, none was measured here" if of_paper else "measured by `runtime`"
        lines[cell.config.data] = (
            f"Matching budget on {cell.config.data}: {cell.at[0]:,} of {cell.at[-1]:,} "
            f"sampling-free steps take the time of {cell.at[-1]:,} sampling steps, where a step "
            f"takes {cell.step_ratio:.2f} times sampling's ({source})."
        )
    return "\n".join(lines.values())


def _draw_table(results: Sequence[Result]):
    measured = {summary.quantity for summary in summarise(results)}
    return dots(results, [Panel(q, q) for q in ("FID", "log ML", "KL") if q in measured])


_ASSUMPTIONS = (
    "the FID's number of images is not stated: 10,000 generated, at most as many test images; "
    "without --inception it is left out, since no other network's numbers are comparable",
    "log ML: the first 1,000 test images",
    "the matching budget, the earlier number of steps, takes the time of sampling's whole run by "
    "the step times at m = 16 that `runtime` had measured on that data set in the same folder when "
    "the first run began; else it is the paper's 65% of the steps",
    *ASSUMPTIONS,
)
TABLE2 = Experiment(
    title="FID and log ML at m = 16, at equal steps and at equal budget",
    cells=_table2_cells,
    draw=_draw_table,
    assumptions=_ASSUMPTIONS,
    reading=_budgets,
)
FIGURE4 = Experiment(
    title="FID and log ML against m",
    cells=lambda options: _figure_cells(options, "celeba"),
    draw=_draw_sizes,
    assumptions=("the values of m in 12 to 64 are ours", *_ASSUMPTIONS),
    last_only=True,
)
FIGURE_C1 = Experiment(
    title="FID and log ML against m",
    cells=lambda options: _figure_cells(options, "chairs"),
    draw=_draw_sizes,
    assumptions=(
        "m is said to go to 32 in 4.2 and to 16 in B.1: 8, 12, 16",
        *_ASSUMPTIONS,
    ),
    last_only=True,
)
