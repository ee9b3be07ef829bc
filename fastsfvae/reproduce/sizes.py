"""Tables 2 and 5, Figures 4 and C.1: FID and log ML on CelebA and 3D Chairs (4.2, C.1, C.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastsfvae.config import Method, TrainConfig
from fastsfvae.reproduce.cells import Cell, Experiment, Options, Published, Result
from fastsfvae.reproduce.figures import Panel, dots, row_of_panels, tidy
from fastsfvae.reproduce.images import ASSUMPTIONS, image_protocol
from fastsfvae.reproduce.measures import Likelihoods, Quality
from fastsfvae.reproduce.tables import summarise

_METHODS: tuple[Method, ...] = ("sampling-free", "sampling")
# The sampling-free run's share of the steps that takes the time of the whole sampling run, there.
_MATCHING_SHARE = 0.65
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


def _paper(data: str, method: str, at: Sequence[int]) -> Mapping[str, Mapping[int, Published]]:
    """The paper's values, those of the matching budget at the earlier of two steps."""
    printed = _PAPER.get(data, {})
    names = ("matching", method) if len(at) == 2 else (method,)
    paper: dict[str, dict[int, Published]] = {}
    for step, name in zip(at, names, strict=True):
        for quantity, value in printed.get(name, {}).items():
            paper.setdefault(quantity, {})[step] = value
    return paper


def _cell(options: Options, data: str, method: Method, m: int, matching: bool) -> Cell:
    protocol = image_protocol(options, data)
    config = TrainConfig(**protocol.settings, method=method, latent_dim=m)
    likelihoods = Likelihoods(samples=50_000, images=1000)
    if options.quick:
        likelihoods = Likelihoods(samples=200, images=100)
    steps = options.steps or protocol.steps
    ratio = options.step_ratios.get(data, 1 / _MATCHING_SHARE)
    at = (max(1, round(steps / ratio)), steps) if matching and ratio > 1 else (steps,)
    # The paper's values belong to its own m and number of steps.
    printed = m == 16 and steps == protocol.steps
    return Cell(
        f"{data}, {method}, m={m}",
        config,
        Quality(likelihoods, options.inception),
        at,
        3,
        _paper(data, method, at) if printed else {},
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


def _draw_table(results: Sequence[Result]):
    measured = {summary.quantity for summary in summarise(results)}
    return dots(results, [Panel(q, q) for q in ("FID", "log ML", "KL") if q in measured])


_ASSUMPTIONS = (
    "the FID's number of images is not stated: 10,000 generated, at most as many test images; "
    "without --inception it is left out, since no other network's numbers are comparable",
    "log ML: the first 1,000 test images",
    "the matching budget, the earlier number of steps, takes the time of sampling's whole run by "
    "the step times at m = 16 that `runtime` measured on that data set into the same folder; "
    "without them it is the paper's 65% of the steps",
    *ASSUMPTIONS,
)
TABLE2 = Experiment(
    title="FID and log ML at m = 16, at equal steps and at equal budget",
    cells=_table2_cells,
    draw=_draw_table,
    assumptions=_ASSUMPTIONS,
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
