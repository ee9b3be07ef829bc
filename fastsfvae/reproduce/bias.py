"""Bias of the sampling-free objectives against the Monte Carlo error they spare (beyond 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastsfvae import evaluate
from fastsfvae.reproduce.cells import Cell, Experiment, Options, Result
from fastsfvae.reproduce.figures import log_counts, row_of_panels, tidy
from fastsfvae.reproduce.measures import LIKELIHOOD_COLUMNS, Likelihoods, images_of
from fastsfvae.reproduce.tables import grid, last_summaries
from fastsfvae.reproduce.wallclock import STEPS
from fastsfvae.results.report import encode
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.run import Run, evaluation_generator

_OBJECTIVES: dict[str, dict[str, Any]] = {
    "precision .95": {"likelihood": "precision", "gamma": 0.95},
    "precision .67": {"likelihood": "precision", "gamma": 0.67},
    "precision .5": {"likelihood": "precision", "gamma": 0.5},
    "expected": {"likelihood": "expected"},
}
_SAMPLING = "sampling VAE"
_SAMPLES = (1, 4, 16, 64)
_ERRORS = ("loss", "gradient")


@dataclass(frozen=True)
class ObjectiveBias:
    """Bias of every sampling-free objective on one model, and the sampling objective's deviation.

    Attributes:
        likelihoods: how the model itself is judged.
        repeats: evaluations of the sampling objective for each K.
        batch: images of the batch whose loss and gradient are compared.
    """

    likelihoods: Likelihoods
    repeats: int = 20
    batch: int = 64

    @property
    def conventions(self) -> dict[str, str]:
        """See `Measure`."""
        batch = f"on the first {self.batch} test images as one batch"
        return self.likelihoods.conventions | {
            "active units": "dimensions with Var_x(E_q[z_i]) > 0.01, on the same images",
            "gap": "objective - sampled ELBO, mean over the same images, 10 draws each; positive: "
            "the objective lies above the ELBO",
            "loss and gradient bias": f"of the objective against the sampled ELBO, {batch}; the "
            "gradient is that in the posterior and the decoder's weights, as one norm",
            "deviation, K": f"of the sampling objective with K draws an image, {batch}, "
            f"{self.repeats} evaluations; of the gradient: the root of the summed variances",
            "equal K": "the K at which that deviation equals the bias",
        }

    def __call__(self, run: Run) -> dict[str, float]:
        """See `Measure`."""
        c = run.config.noise_var
        x = images_of(run, "test", self.likelihoods.images)
        mean, log_var = encode(run.encoder, x)
        numbers = self.likelihoods(run)
        numbers["active units"] = float(evaluate.posterior_collapse(mean, log_var).active)
        first = (run.decoder, x[: self.batch], mean[: self.batch], log_var[: self.batch])
        for name, objective in _OBJECTIVES.items():
            # The same noise for each, so that only the objectives differ.
            noise = evaluation_generator(run.config, run.device)
            gap = evaluate.objective_gap(
                *(run.decoder, x, mean, log_var),
                noise_var=c,
                samples=10,
                generator=noise,
                **objective,
            )
            error = evaluate.gradient_error(
                *first,
                noise_var=c,
                samples=_SAMPLES,
                repeats=self.repeats,
                generator=noise,
                **objective,
            )
            numbers |= {
                f"gap, {name}": float(gap.gap.mean()),
                f"loss bias, {name}": abs(error.loss_bias),
                f"gradient bias, {name}": error.gradient_bias,
                f"equal K, loss, {name}": error.equal_loss_samples,
                f"equal K, gradient, {name}": error.equal_gradient_samples,
            }
        for kind in _ERRORS:
            variances = zip(_SAMPLES, getattr(error, f"{kind}_variance"), strict=True)
            numbers |= {f"{kind} deviation, K={k}": v**0.5 for k, v in variances}
        return numbers


def _cells(options: Options) -> list[Cell]:
    steps = 200 if options.quick else STEPS
    measure = ObjectiveBias(Likelihoods(samples=500, images=100 if options.quick else 250))
    if options.quick:
        measure = replace(measure, repeats=5)
    (data,) = options.data_sets("digits")
    base = TrainConfig(**options.place(data), model="mlp")
    configs = {_SAMPLING: replace(base, method="sampling")}
    configs |= {name: replace(base, **objective) for name, objective in _OBJECTIVES.items()}
    seeds = 1 if options.quick else 3
    return [Cell(name, config, measure, (steps,), seeds) for name, config in configs.items()]


def _means(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Cell -> quantity -> mean over seeds, after the last step."""
    means: dict[str, dict[str, float]] = {}
    for row in last_summaries(results):
        means.setdefault(row.cell, {})[row.quantity] = row.mean
    return means


def _reading(results: Sequence[Result]) -> str:
    """Every objective on every model: its gap, and the K of equal error."""
    rows = []
    for cell, values in _means(results).items():
        rows.append([cell])
        for name in _OBJECTIVES:
            counts = (f"{values[f'equal K, {kind}, {name}']:.2g}" for kind in _ERRORS)
            rows[-1].append(f"{values[f'gap, {name}']:.2f} ({', '.join(counts)})")
    lines = [
        "gap in nats; in brackets the K at which the sampling objective's loss, then its gradient, "
        "has an error as large as the bias:",
        "",
        *grid(["trained by", *(f"gap of {name}" for name in _OBJECTIVES)], rows),
    ]
    return "\n".join(lines)


def _draw(results: Sequence[Result]):
    """Gaps of all objectives on all models; on the sampling VAE, bias against deviation."""
    means = _means(results)
    figure, (axes, *panels) = row_of_panels(1 + len(_ERRORS), 4.4, 3.6)
    rows = list(means)[::-1]
    for i, name in enumerate(_OBJECTIVES):
        gaps = [means[row][f"gap, {name}"] for row in rows]
        axes.plot(gaps, range(len(rows)), "o", color=f"C{i}", label=name)
    axes.set_xscale("symlog", linthresh=1)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"trained by {row}" for row in rows])
    axes.grid(axis="y", alpha=0.3)
    tidy(axes, "objective - sampled ELBO", "nats per image; linear below 1")
    axes.legend(fontsize=7, frameon=False)
    judged = _SAMPLING if _SAMPLING in means else rows[-1]
    for axes, kind in zip(panels, _ERRORS, strict=True):
        values = means[judged]
        deviations = [values[f"{kind} deviation, K={k}"] for k in _SAMPLES]
        axes.plot(_SAMPLES, deviations, "k.-", label="sampling, K draws: deviation")
        for i, name in enumerate(_OBJECTIVES):
            bias = values[f"{kind} bias, {name}"]
            axes.axhline(bias, color=f"C{i}", label=f"{name}: bias")
        log_counts(axes, _SAMPLES)
        axes.set_yscale("log")
        tidy(axes, f"error of the {kind}, trained by {judged}", "draws K per image, B = 64")
    panels[-1].legend(fontsize=7, frameon=False)
    return figure


BIAS = Experiment(
    title="Bias of the sampling-free objectives, and the sampling error they spare",
    cells=_cells,
    draw=_draw,
    reading=_reading,
    columns=("log ML", *LIKELIHOOD_COLUMNS, "active units"),
    assumptions=(
        "not in the paper, which works around the bias by gamma: the digits' network "
        "(16-256-512-784), B = 64, Adam at 1e-3, c = 0.5, as many steps for each objective",
    ),
)
