"""The runtime analysis (4.5): the time of a training step."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fastsfvae.data.load import DATA_SETS
from fastsfvae.data.pixels import to_unit
from fastsfvae.models import build
from fastsfvae.objectives import Objective, Sampling
from fastsfvae.reproduce.cells import Cell, Experiment, Options, Published, Result
from fastsfvae.reproduce.figures import row_of_panels, tidy
from fastsfvae.reproduce.images import ASSUMPTIONS, image_protocol
from fastsfvae.reproduce.runner import stored_results
from fastsfvae.reproduce.tables import summarise
from fastsfvae.step_comparison import WARM_UP, Loss, closed_form_loss, timed_step
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.methods import Method
from fastsfvae.training.networks import changes_networks
from fastsfvae.training.run import Run

# Hours of 10^6 steps on a Quadro RTX 6000, CelebA, m = 16.
_PAPER_HOURS = {"sampling": 9.7, "sampling-free": 14.5}
PAPER_RATIO = _PAPER_HOURS["sampling-free"] / _PAPER_HOURS["sampling"]
_PLAIN = "vmap(jacfwd)"
STEP_TIME = "ms per step"
STEP_RATIO = "ratio to a sampling step"
_NAMES = (*_PAPER_HOURS, _PLAIN)
# What the time of a step depends on.
_TIMED = ("data", "model", "method", "latent_dim", "batch_size", "samples", "precision")


@dataclass(frozen=True)
class StepTime:
    """Median time of a whole step, forward, backward and Adam, and its ratio to a sampling one.

    Attributes:
        steps: that are timed, each beside one of the sampling VAE on the same networks.
        plain: whether the objective is the closed form on torch.func's Jacobian, with autograd.
    """

    steps: int = 15
    plain: bool = False

    @property
    def conventions(self) -> dict[str, str]:
        """See `Measure`."""
        return {
            STEP_TIME: f"encoder, objective, gradients and Adam; median of {self.steps} steps "
            "after two that are not counted, in the training run's precision",
            STEP_RATIO: "median over rounds of a step's time over that of a step by one plain draw "
            "behind it, on the same networks, or on those that the method has changed as they "
            "were: what else the machine does meets both",
            _PLAIN: "the same objective from vmap(jacfwd), the closed form and autograd",
        }

    def __call__(self, run: Run) -> dict[str, float]:
        """See `Measure`."""
        loss = _closed_form(run) if self.plain else _loss(run.objective)
        own = _Trained(run.encoder, run.decoder, run.optimizer)
        plain = _as_built(run) if changes_networks(run.config) else own
        sampling = _loss(Sampling(plain.decoder, noise_var=run.noise_var))
        rounds = [
            (_timed_step(run, own, loss), _timed_step(run, plain, sampling))
            for _ in range(WARM_UP + self.steps)
        ]
        return {
            STEP_TIME: statistics.median(time for time, _ in rounds[WARM_UP:]),
            STEP_RATIO: statistics.median(time / beside for time, beside in rounds[WARM_UP:]),
        }


class _Trained(NamedTuple):
    """What a step changes."""

    encoder: nn.Module
    decoder: nn.Module
    optimizer: torch.optim.Optimizer


def _as_built(run: Run) -> _Trained:
    """The run's networks before its method has changed them, untrained."""
    networks = nn.ModuleList(build(run.config.model_config)).to(run.device)
    optimizer = torch.optim.Adam(networks.parameters(), lr=run.config.lr, fused=True)
    encoder, decoder = networks
    return _Trained(encoder, decoder, optimizer)


def _timed_step(run: Run, trained: _Trained, loss: Loss) -> float:
    """Milliseconds."""
    x = to_unit(run.images[: run.config.batch_size])
    return timed_step(lambda: loss(x, *trained.encoder(x)), trained.optimizer, run.device)


def _loss(objective: Objective) -> Loss:
    return lambda x, mean, log_var: objective(x, mean, log_var).loss


def _closed_form(run: Run) -> Loss:
    names = "noise_var", "gamma", "kl_weight", "likelihood"
    settings = {name: getattr(run.config, name) for name in names}
    return closed_form_loss(run.decoder, **settings)


def measured_ratios(options: Options, out: Path) -> dict[str, float]:
    """Of each data set, a sampling-free step's time over a sampling one's at m = 16.

    Args:
        options: of the runs that are looked for.
        out: the folder of results; without runs of `RUNTIME` in it there are none.
    """
    names = {f"{data}, sampling-free, m=16": data for data in DATA_SETS}
    return {
        names[cell.name]: measured[STEP_RATIO]
        for cell, measured in _timed_cells(options, out)
        if cell.name in names and STEP_RATIO in measured
    }


def projected_hours(cells: Sequence[Cell], options: Options, out: Path) -> dict[str, float]:
    """Of each cell whose step was timed, the hours that training all its runs takes.

    Args:
        cells: what is to be trained.
        options: of the runs that are looked for.
        out: the folder of results; without runs of `RUNTIME` in it there are none.
    """
    times = {
        _timed(cell.config): measured[STEP_TIME]
        for cell, measured in _timed_cells(options, out)
        if _PLAIN not in cell.name
    }
    return {
        cell.name: times[timed] * cell.at[-1] * cell.seeds / 3.6e6
        for cell in cells
        if (timed := _timed(cell.config)) in times
    }


def _timed_cells(options: Options, out: Path) -> Iterator[tuple[Cell, Mapping[str, float]]]:
    """The cells of every data set that were timed, and what was measured of their step."""
    for result in stored_results(_cells(replace(options, data="")), out):
        yield result.cell, result.measured(result.steps[-1])


def _timed(config: TrainConfig) -> tuple:
    return tuple(getattr(config, name) for name in _TIMED)


def _cells(options: Options) -> list[Cell]:
    cells = []
    steps = 5 if options.quick else 15
    for data in options.data_sets("celeba", "chairs", "digits"):
        settings = image_protocol(options, data).settings
        for m in (4, 8) if options.quick else (8, 16, 32, 64):
            for name in _NAMES:
                method: Method = "sampling" if name == "sampling" else "sampling-free"
                config = TrainConfig(**settings, method=method, latent_dim=m)
                hours = _PAPER_HOURS.get(name) if (data, m) == ("celeba", 16) else None
                # 10^6 steps an hour are 3.6 ms a step.
                paper = {} if hours is None else {STEP_TIME: {1: Published(3.6 * hours)}}
                measure = StepTime(steps, plain=name == _PLAIN)
                cells.append(Cell(f"{data}, {name}, m={m}", config, measure, (1,), 1, paper))
    return cells


def _draw(results: Sequence[Result]):
    cells = {result.cell.name: result.cell.config for result in results}
    names = list(dict.fromkeys(config.data for config in cells.values()))
    figure, panels = row_of_panels(len(names), 4.8, 3.4)
    for axes, data in zip(panels, names, strict=True):
        for name in _NAMES:
            points = {
                cells[s.cell].latent_dim: s.mean
                for s in summarise(results)
                if s.quantity == STEP_TIME and s.cell.startswith(f"{data}, {name}, ")
            }
            axes.plot(list(points), list(points.values()), marker=".", label=name)
        axes.set_xticks(sorted({c.latent_dim for c in cells.values() if c.data == data}))
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, frameon=False)
        tidy(axes, f"{data}: ms per training step, B = 64", "latent dimensions m")
    return figure


RUNTIME = Experiment(
    title="Time of a training step, sampling-free against sampling",
    cells=_cells,
    draw=_draw,
    assumptions=(
        "the paper times a Quadro RTX 6000, in hours of 10^6 steps; here it is the device that the "
        "runs name",
        *ASSUMPTIONS,
    ),
)
