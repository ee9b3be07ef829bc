"""Figures 1 and C.2: what gamma does to the objective and to the sampled ELBO (3.3, C.3)."""

from __future__ import annotations

from collections.abc import Sequence

from fastsfvae.reproduce.cells import Cell, Experiment, Options, Published, Result
from fastsfvae.reproduce.figures import row_of_panels, tidy
from fastsfvae.reproduce.images import ASSUMPTIONS, image_protocol
from fastsfvae.reproduce.measures import ObjectiveGap
from fastsfvae.training.config import TrainConfig

# Where each of Figure 1's phases converges, as the text says (3.3).
_PAPER = {0.95: Published(-8000), 0.67: Published(-7500), 0.5: Published(-7400)}
_POINTS = 24


def _points(steps: int) -> tuple[int, ...]:
    """Equally spaced; in each third of the way as many."""
    if steps < _POINTS:
        raise ValueError(f"--steps {steps}: a curve of {_POINTS} points takes at least {_POINTS}")
    return tuple(steps * (i + 1) // _POINTS for i in range(_POINTS))


def _figure1_cells(options: Options) -> list[Cell]:
    cells = []
    for data in options.data_sets("celeba", "digits"):
        protocol = image_protocol(options, data)
        steps = options.steps or protocol.steps
        before = ",".join(f"{gamma:g}" for gamma in list(_PAPER)[:-1])
        config = TrainConfig(
            **protocol.settings,
            latent_dim=protocol.latent_dim,
            gamma=list(_PAPER)[-1],
            gamma_schedule=f"steps:{before}",
        )
        at = _points(steps)
        ends = [at[_POINTS * (i + 1) // len(_PAPER) - 1] for i in range(len(_PAPER))]
        paper = dict(zip(ends, _PAPER.values(), strict=True)) if data == "celeba" else {}
        cells.append(Cell(data, config, ObjectiveGap(), at, paper={"sampled ELBO": paper}))
    return cells


def _figure_c2_cells(options: Options) -> list[Cell]:
    gammas = (0.95, 0.5) if options.quick else (0.99, 0.95, 0.67, 0.5, 0.1)
    cells = []
    for data in options.data_sets("celeba", "digits"):
        protocol = image_protocol(options, data)
        for gamma in gammas:
            config = TrainConfig(**protocol.settings, latent_dim=protocol.latent_dim, gamma=gamma)
            at = _points(options.steps or protocol.steps)
            cells.append(Cell(f"{data}, gamma={gamma:g}", config, ObjectiveGap(), at))
    return cells


def _draw_schedule(results: Sequence[Result]):
    figure, panels = row_of_panels(len(results), 6.4, 3.6)
    for axes, result in zip(panels, results, strict=True):
        _plot(axes, result, "sampled ELBO")
        start, before = 0, None
        for step in result.steps:
            gamma = result.measured(step)["gamma"]
            if gamma != before:
                axes.axvline(start, color="gray", linewidth=0.8, linestyle=":")
                place = {"xy": (start, 0.02), "xycoords": ("data", "axes fraction")}
                axes.annotate(f" gamma {gamma:g}", **place, fontsize=8)
            start, before = step, gamma
        tidy(axes, f"{result.cell.name}, seed {result.seed}: sampled ELBO (nats)", "step")
    return figure


def _draw_gap(results: Sequence[Result]):
    figure, panels = row_of_panels(len(results), 2.9, 3.2, share_y=True)
    for axes, result in zip(panels, results, strict=True):
        for quantity in ("objective", "sampled ELBO"):
            _plot(axes, result, quantity)
        tidy(axes, result.cell.name, "step")
    panels[0].legend(fontsize=8, frameon=False)
    panels[0].set_ylabel("nats per image", fontsize=9)
    return figure


def _plot(axes, result: Result, quantity: str) -> None:
    # The first points would flatten all that follow.
    steps = result.steps[len(result.steps) // 8 :]
    values = [result.measured(step)[quantity] for step in steps]
    axes.plot(steps, values, marker=".", linewidth=1.2, label=quantity)
    if paper := result.cell.paper.get(quantity):
        marks = [value.value for value in paper.values()]
        axes.plot(list(paper), marks, "k_", markersize=14, label="paper")


FIGURE1 = Experiment(
    title="One run, gamma stepped .95, .67, .5: the sampled ELBO",
    cells=_figure1_cells,
    draw=_draw_schedule,
    assumptions=(
        "the phases are equally long",
        "m is not stated: 32 on CelebA, as in the qualitative experiments",
        *ASSUMPTIONS,
    ),
)
FIGURE_C2 = Experiment(
    title="Objective and sampled ELBO of the same model, for several gamma",
    cells=_figure_c2_cells,
    draw=_draw_gap,
    assumptions=("the gammas are ours: .99, .95, .67, .5, .1", *ASSUMPTIONS),
    last_only=True,
)
