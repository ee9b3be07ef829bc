"""Bias of the sampling-free objectives, in scale and direction, against the sampling error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastsfvae import evaluate
from fastsfvae._noise import Draws
from fastsfvae.reproduce.cells import Cell, Experiment, Options, Result
from fastsfvae.reproduce.figures import legend_below, log_counts, log_numbers, tidy
from fastsfvae.reproduce.measures import LIKELIHOOD_COLUMNS, Likelihoods, images_of
from fastsfvae.reproduce.recipes import RECIPES, SAMPLING, scaled
from fastsfvae.reproduce.tables import grid, summarise
from fastsfvae.reproduce.wallclock import STEPS
from fastsfvae.results.pictures import new_figure
from fastsfvae.results.samples import encode
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.run import Run, evaluation_generator

_OBJECTIVES: dict[str, dict[str, Any]] = {
    "precision .95": {"likelihood": "precision", "gamma": 0.95},
    "precision .67": {"likelihood": "precision", "gamma": 0.67},
    "precision .5": {"likelihood": "precision", "gamma": 0.5},
    "expected": {"likelihood": "expected"},
}
_PARTS = ("decoder", "encoder")
# Of the K that are measured, one for the table.
_FEW = 4
# Steps of measuring before the last: what an objective's direction is worth changes in training.
_EARLIER = (100, 500)


@dataclass(frozen=True)
class ObjectiveBias:
    """Bias of every sampling-free objective on one model, and the sampling objective's deviation.

    Attributes:
        likelihoods: how the model itself is judged.
        repeats: evaluations of the sampling objective for each K.
        batch: images of the batch whose loss and gradient are compared.
        samples: the K.
        pairs: of orthogonal directions, at most m.
    """

    likelihoods: Likelihoods
    repeats: int = 20
    batch: int = 64
    samples: tuple[int, ...] = (1, 4, 16, 64)
    pairs: int = 4

    @property
    def _paired(self) -> dict[str, tuple[int, Draws]]:
        """Draws that are not independent: how many, and of which kind."""
        several: tuple[int, Draws] = (2 * self.pairs, "orthogonal")
        return {"antithetic pair": (2, "antithetic"), f"{self.pairs} orthogonal pairs": several}

    @property
    def conventions(self) -> dict[str, str]:
        """See `Measure`."""
        batch = f"on the first {self.batch} test images as one batch"
        return self.likelihoods.conventions | {
            "active units": "dimensions with Var_x(E_q[z_i]) > 0.01, on the same images",
            "gap": "objective - sampled ELBO, mean over the same images, 10 draws each; positive: "
            "the objective lies above the ELBO",
            "loss bias": f"of the objective against the sampled ELBO, {batch}",
            "relative bias": f"|objective's gradient - true gradient| / |true gradient|, {batch}, "
            "in the decoder's weights and in the encoder's; the true gradient is the ELBO's, from "
            f"{self.repeats * sum(self.samples):,} draws an image, their noise taken off",
            "cosine": "of the angle between the objective's gradient and the true one; below 0 a "
            "step along the one is a step against the other",
            "deviation, K": f"of the sampling objective with K draws an image, {batch}, "
            f"{self.repeats} evaluations; relative: the root of the gradient's summed variances "
            "over the norm of the true gradient; a relative deviation d leaves a cosine of about "
            "1 / sqrt(1 + d^2)",
            ", ".join(self._paired): f"2 and {2 * self.pairs} draws an image, "
            f"{4 * self.repeats} evaluations",
            "equal K": "the K at which that deviation equals the bias",
            "error": "standard error of the number that it follows, for one run",
        }

    def __call__(self, run: Run) -> dict[str, float]:
        """See `Measure`."""
        c = run.noise_var
        x = images_of(run, "test", self.likelihoods.images)
        mean, log_var = encode(run.encoder, x)
        numbers = self.likelihoods(run)
        numbers["active units"] = float(evaluate.posterior_collapse(mean, log_var).active)
        first = (run.decoder, x[: self.batch], mean[: self.batch], log_var[: self.batch])
        settings: dict[str, Any] = {"noise_var": c, "encoder": run.encoder}
        errors = evaluate.gradient_errors(
            *first,
            objectives=list(_OBJECTIVES.values()),
            samples=self.samples,
            repeats=self.repeats,
            generator=evaluation_generator(run.config, run.device),
            **settings,
        )
        for (name, objective), error in zip(_OBJECTIVES.items(), errors, strict=True):
            gap = evaluate.objective_gap(
                *(run.decoder, x, mean, log_var),
                noise_var=c,
                samples=10,
                # The same noise for each, so that only the objectives differ.
                generator=evaluation_generator(run.config, run.device),
                **objective,
            )
            numbers |= {
                f"gap, {name}": float(gap.gap.mean()),
                f"loss bias, {name}": abs(error.loss_bias),
                f"equal K, loss, {name}": error.equal_loss_samples,
            }
            for part in _PARTS:
                found = getattr(error, part)
                numbers |= {
                    f"relative bias, {part}, {name}": found.relative_bias,
                    f"relative bias, {part}, {name}, error": found.relative_bias_error,
                    f"cosine, {part}, {name}": found.cosine,
                    f"cosine, {part}, {name}, error": found.cosine_error,
                    f"equal K, {part}, {name}": found.equal_samples,
                }
        for k, variance in zip(self.samples, error.loss_variance, strict=True):
            numbers[f"loss deviation, K={k}"] = variance**0.5
        for part in _PARTS:
            found = getattr(error, part)
            numbers |= {
                f"true gradient, {part}": found.norm,
                f"true gradient, {part}, error": found.norm_error,
            }
            for k, deviation in zip(self.samples, found.relative_deviation, strict=True):
                numbers[f"relative deviation, {part}, K={k}"] = deviation
        for name, (count, draws) in self._paired.items():
            paired = evaluate.gradient_error(
                *first,
                samples=(count,),
                draws=draws,
                repeats=4 * self.repeats,
                generator=evaluation_generator(run.config, run.device),
                **settings,
            )
            for part in _PARTS:
                (deviation,) = getattr(paired, part).relative_deviation
                numbers[f"relative deviation, {part}, {name}"] = deviation
        return numbers


def _cells(options: Options) -> list[Cell]:
    at = (50, 100) if options.quick else (*_EARLIER, STEPS)
    measure = ObjectiveBias(Likelihoods(samples=500, images=100 if options.quick else 250))
    if options.quick:
        measure = replace(measure, repeats=5, samples=(1, 4))
    (data,) = options.data_sets("digits")
    base = TrainConfig(**options.place(data), model="mlp")
    names = [SAMPLING] if options.quick else list(RECIPES)
    recipes = {name: scaled(RECIPES[name], at[-1] / STEPS) for name in names}
    configs = {name: replace(base, **recipe.settings) for name, recipe in recipes.items()}
    configs |= {name: replace(base, **objective) for name, objective in _OBJECTIVES.items()}
    seeds = 1 if options.quick else 3
    return [Cell(name, config, measure, at, seeds) for name, config in configs.items()]


# Cell -> step -> quantity -> mean over seeds.
_Means = dict[str, dict[int, dict[str, float]]]


def _means(results: Sequence[Result]) -> _Means:
    means: _Means = {}
    for row in summarise(results):
        means.setdefault(row.cell, {}).setdefault(row.step, {})[row.quantity] = row.mean
    return means


def _reading(results: Sequence[Result]) -> str:
    """Every objective on every model: its gap, its gradient's direction, and its scale."""
    rows = [
        ([f"{cell}, {step:,}"], values)
        for cell, steps in _means(results).items()
        for step, values in steps.items()
    ]

    def table(text: str, show: Callable[[Mapping[str, float], str], str]) -> list[str]:
        shown = [head + [show(values, name) for name in _OBJECTIVES] for head, values in rows]
        return [text, "", *grid(["trained by, steps", *_OBJECTIVES], shown), ""]

    def gap(values: Mapping[str, float], name: str) -> str:
        return f"{values[f'gap, {name}']:.2f} ({values[f'equal K, loss, {name}']:.2g})"

    def cosine(values: Mapping[str, float], name: str) -> str:
        return " / ".join(f"{values[f'cosine, {part}, {name}']:.2f}" for part in _PARTS)

    def bias(values: Mapping[str, float], name: str) -> str:
        return " / ".join(
            f"{values[f'relative bias, {part}, {name}']:.2f} "
            f"({values[f'equal K, {part}, {name}']:.2g})"
            for part in _PARTS
        )

    named = (q.rpartition(", ")[2] for q in rows[0][1] if q.startswith("relative deviation, dec"))
    kinds = ["K=1", f"K={_FEW}", *(kind for kind in named if "pair" in kind)]
    deviations = [
        head
        + [
            " / ".join(f"{values[f'relative deviation, {part}, {kind}']:.2f}" for part in _PARTS)
            for kind in kinds
        ]
        for head, values in rows
    ]
    lines = [
        *table(
            "Gap to the sampled ELBO in nats; in brackets the K at which the sampling objective's "
            "loss has an error as large as the loss's bias:",
            gap,
        ),
        *table("Cosine of the gradient with the true one, decoder / encoder:", cosine),
        *table(
            "Bias of the gradient over the norm of the true one, decoder / encoder; in brackets "
            "the K at which sampling's relative deviation is as large:",
            bias,
        ),
        "Relative deviation of the sampled gradient, decoder / encoder:",
        "",
        *grid(["trained by, steps", *kinds], deviations),
    ]
    return "\n".join(lines)


def _draw(results: Sequence[Result]):
    """All objectives: gaps on all models; on the sampling VAE direction and scale of the bias."""
    means = _means(results)
    judged = SAMPLING if SAMPLING in means else next(iter(means))
    figure = new_figure(14, 7.6)
    (gaps, *cosines), (losses, *scales) = figure.subplots(2, 3)
    _draw_gaps(gaps, means)
    last = max(means[judged])
    for axes, part in zip(cosines, _PARTS, strict=True):
        _draw_cosines(axes, means[judged], part)
        tidy(axes, f"direction, {part}'s weights", f"steps of training, by {judged}")
        axes.set_ylabel("cosine with the true gradient", fontsize=9)
    _draw_errors(losses, means[judged][last], "loss", "loss bias", "loss deviation")
    losses.set_ylabel("error of the loss, nats", fontsize=9)
    for axes, part in zip(scales, _PARTS, strict=True):
        names = f"relative bias, {part}", f"relative deviation, {part}"
        _draw_errors(axes, means[judged][last], f"gradient, {part}'s weights", *names)
        axes.set_ylabel("error / norm of the true gradient", fontsize=9)
    for axes in (losses, *scales):
        axes.set_xlabel(f"draws K an image; {judged}, {last:,} steps", fontsize=9)
    legend_below(figure, scales[0])
    return figure


def _draw_gaps(axes, means: _Means) -> None:
    rows = list(means)[::-1]
    for i, name in enumerate(_OBJECTIVES):
        gaps = [means[row][max(means[row])][f"gap, {name}"] for row in rows]
        axes.plot(gaps, range(len(rows)), "o", color=f"C{i}")
    axes.set_xscale("symlog", linthresh=1)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylabel("trained by", fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    tidy(axes, "objective - sampled ELBO", "nats per image; linear below 1")


def _draw_cosines(axes, by_step: Mapping[int, Mapping[str, float]], part: str) -> None:
    """Those of the objectives, and of one draw by its deviation."""
    steps = list(by_step)
    one_draw = (values[f"relative deviation, {part}, K=1"] for values in by_step.values())
    axes.plot(steps, [(1 + d * d) ** -0.5 for d in one_draw], "k.--")
    for i, name in enumerate(_OBJECTIVES):
        cosines, errors = (
            [values[f"cosine, {part}, {name}{end}"] for values in by_step.values()]
            for end in ("", ", error")
        )
        axes.errorbar(steps, cosines, yerr=errors, fmt="o-", color=f"C{i}", markersize=4)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylim(-1.05, 1.05)
    log_counts(axes, steps)


def _draw_errors(axes, values: Mapping[str, float], title: str, bias: str, deviation: str) -> None:
    """Biases of the objectives as lines across, the deviation of K draws as it falls."""
    counts = [int(q.rpartition("=")[2]) for q in values if q.startswith(f"{deviation}, K=")]
    deviations = [values[f"{deviation}, K={k}"] for k in counts]
    label = "sampling, K draws (dashed: K = 1)"
    axes.plot(counts, deviations, "k.-", label=label)
    for i, name in enumerate(_OBJECTIVES):
        axes.axhline(values[f"{bias}, {name}"], color=f"C{i}", label=name)
    log_counts(axes, counts)
    axes.set_yscale("log")
    log_numbers(axes.yaxis)
    tidy(axes, f"error of the {title}")


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
