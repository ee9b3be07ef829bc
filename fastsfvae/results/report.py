"""What training ends with: results.json and the printed table, of both splits of a run's data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsfvae import evaluate
from fastsfvae.data.load import data_label
from fastsfvae.data.pixels import to_unit
from fastsfvae.evaluate import (
    ImageMean,
    LogMarginalLikelihood,
    mean_over_images,
    monte_carlo_error,
)
from fastsfvae.evaluate.proposals import DEFAULT_PROPOSAL, ProposalName
from fastsfvae.ground.atomic import write_text
from fastsfvae.ground.provenance import VERSION, commit
from fastsfvae.objectives import Objective
from fastsfvae.results import verdict
from fastsfvae.results.samples import encode, without_density
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.run import Run, evaluation_generator

RESULTS = "results.json"
_BATCH = 250
_MAX_IMAGES = 10_000
_OF_WEIGHTS = (
    "log_ml_monte_carlo_error",
    "log_ml_bias",
    "median_effective_samples",
    "smallest_effective_samples",
)
_OF_RUN = (*_OF_WEIGHTS, "seconds", "steps_per_second")
# Importance weights an image that the commands take unless told otherwise: what each can spend.
WEIGHTS = {"train": 100, "evaluate": 50_000, "compare": 1_000}


class Report(NamedTuple):
    """Results of a run.

    Of a method without a density of x what rests on one is NaN, None or left out.

    Attributes:
        conventions: everything that a number's meaning depends on.
        splits: split -> quantity -> mean over images and its standard error.
        collapse: dimensions collapsed, active and in all (test images).
        log_ml_monte_carlo_error: Monte Carlo error of the test split's mean log ML.
        log_ml_bias: estimated bias of the test split's mean log ML, in nats: `bias` of
            `LogMarginalLikelihood`, averaged over images.
        median_effective_samples: of the importance weights, over test images.
        smallest_effective_samples: the same of the image that has fewest.
        seconds: time spent training.
        steps_per_second: training rate.
    """

    conventions: dict[str, Any]
    splits: dict[str, dict[str, ImageMean]]
    collapse: dict[str, int | None]
    log_ml_monte_carlo_error: float
    log_ml_bias: float
    median_effective_samples: float
    smallest_effective_samples: float
    seconds: float
    steps_per_second: float

    @property
    def values(self) -> dict[str, float]:
        """All numbers that are finite, by names such as "test/KL" and "collapse/active"."""
        found: dict[str, float | None] = {}
        for split, quantities in self.splits.items():
            for name, (mean, error) in quantities.items():
                found |= {f"{split}/{name}": mean, f"{split}/{name}, standard error": error}
        found |= {f"collapse/{name}": count for name, count in self.collapse.items()}
        found |= {name: getattr(self, name) for name in _OF_RUN}
        return {k: v for k, v in found.items() if v is not None and math.isfinite(v)}

    def save(self, folder: Path) -> None:
        """Write results.json."""
        write_text(folder / RESULTS, json_text(self))


def load_report(folder: Path) -> Report | None:
    """Read results.json back; None where there is none, as the run was interrupted.

    Raises:
        ValueError: where it is damaged or another version's, in one line.
    """
    path = folder / RESULTS
    if not path.is_file():
        return None

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    try:
        found = json.loads(path.read_text())
        found["splits"] = {
            split: {
                name: ImageMean(number(value["mean"]), number(value["standard_error"]))
                for name, value in quantities.items()
            }
            for split, quantities in found["splits"].items()
        }
        report = Report(**found | {name: number(found[name]) for name in _OF_RUN})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or another version's: write it anew with fastsfvae train --resume "
            f"--out {folder}"
        ) from error
    return report


def json_text(value: Any) -> str:
    """Lay out results as JSON: named tuples as objects, numbers that are not finite as null."""

    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            value = value._asdict()
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), indent=2, allow_nan=False) + "\n"


@torch.no_grad()
def objective_values(
    objective: Objective, x: Tensor, mean: Tensor, log_var: Tensor, generator: torch.Generator
) -> Tensor:
    """Evaluate what a method maximises on images ``[N, C, H, W]`` in chunks; ``[N]`` in nats."""
    chunks = zip(x.split(_BATCH), mean.split(_BATCH), log_var.split(_BATCH), strict=True)
    return torch.cat([objective(*chunk, generator=generator).objective for chunk in chunks])


@torch.no_grad()
def measure(
    encoder: nn.Module,
    decoder: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    noise_var: float,
    generator: torch.Generator,
    objective: Objective | None = None,
    has_density: bool = True,
) -> dict[str, Tensor]:
    """Quantities per image, each ``[N]``: objective (if given), sampled ELBO, KL, both errors.

    Without a density, the objective and the error at the mean alone.
    """
    mean, log_var = encode(encoder, x)
    quantities = {}
    if objective is not None:
        quantities["objective"] = objective_values(objective, x, mean, log_var, generator)
    at_mean = {"squared error at the mean": evaluate.squared_error_at_mean(decoder, x, mean)}
    if not has_density:
        return quantities | at_mean
    elbo = evaluate.sampled_elbo(
        decoder, x, mean, log_var, noise_var=noise_var, generator=generator
    )
    quantities |= {"sampled ELBO": elbo.elbo, "KL": elbo.kl}
    return quantities | at_mean | {"squared error, sampled": elbo.squared_error}


@torch.no_grad()
def evaluate_run(run: Run, *, importance_samples: int = WEIGHTS["train"]) -> Report:
    """Evaluate a run on up to 10,000 images a split; log ML and collapse on the test images.

    A method without a density of x is judged by its objective, its error and its active dimensions.
    The importance weights come from the commands' proposal, or, where the decoder cannot be
    linearised, from the posterior; `conventions` says which.
    """
    config, has_density = run.judged, not without_density(run.config)
    run.encoder.eval()
    run.decoder.eval()
    generator = evaluation_generator(config, run.device)
    test = to_unit(config.load_images("test")[:_MAX_IMAGES].to(run.device))
    train = to_unit(run.images[:_MAX_IMAGES])
    splits = {}
    for split, x in (("train", train), ("test", test)):
        quantities = measure(
            run.encoder,
            run.decoder,
            x,
            noise_var=config.noise_var,
            generator=generator,
            objective=run.objective,
            has_density=has_density,
        )
        splits[split] = {name: mean_over_images(values) for name, values in quantities.items()}

    mean, log_var = encode(run.encoder, test)

    def log_marginal_likelihood(proposal: ProposalName) -> LogMarginalLikelihood:
        return evaluate.log_marginal_likelihood(
            *(run.decoder, test, mean, log_var),
            samples=importance_samples,
            proposal=proposal,
            noise_var=config.noise_var,
            generator=generator,
        )

    proposal: str = DEFAULT_PROPOSAL
    collapse = evaluate.posterior_collapse(mean, log_var)
    log_ml = None
    if has_density:
        try:
            log_ml = log_marginal_likelihood(DEFAULT_PROPOSAL)
        except (TypeError, ValueError, RuntimeError) as error:
            # A method that samples trains decoders that cannot be linearised.
            log_ml = log_marginal_likelihood("posterior")
            proposal = f"posterior, as {DEFAULT_PROPOSAL} fails ({' '.join(str(error).split())})"
        splits["test"]["log ML"] = mean_over_images(log_ml.estimate)
    return Report(
        conventions=conventions(config, importance_samples, proposal)
        | {"split": f"{len(train):,} train / {len(test):,} test images evaluated"}
        | {"data_scale": run.scale},
        splits=splits,
        collapse={
            "collapsed": collapse.collapsed if has_density else None,
            "active": collapse.active,
            "latent_dim": collapse.latent_dim,
        },
        **_weights(log_ml),
        seconds=run.seconds,
        steps_per_second=run.step / run.seconds if run.seconds else math.nan,
    )


def _weights(log_ml: LogMarginalLikelihood | None) -> dict[str, float]:
    """What `Report` says of the importance weights."""
    if log_ml is None:
        return dict.fromkeys(_OF_WEIGHTS, math.nan)
    effective = log_ml.effective_samples
    error, bias = monte_carlo_error(log_ml.standard_error), log_ml.bias.mean()
    found = error, float(bias), float(effective.median()), float(effective.min())
    return dict(zip(_OF_WEIGHTS, found, strict=True))


def conventions(config: TrainConfig, importance_samples: int, proposal: str) -> dict[str, Any]:
    """What a number's meaning depends on, as JSON-able values."""
    not_judged = without_density(config)
    of_densities = {
        "log_ml": f"K={importance_samples} importance weights, proposal {proposal}",
        "log_ml_elsewhere": "by default K is "
        + ", ".join(f"{count:,} in {command}" for command, count in WEIGHTS.items())
        + f", and the proposal {DEFAULT_PROPOSAL}",
        "sampled_elbo": "1 draw of q(z|x) per image",
        "collapse": "epsilon=0.05 nats, delta=0.01, test images",
    }
    return {
        "constant": "-(n/2) log(2 pi c) included; listed apart where it is left out",
        "constant_value": constant(config),
        "pixel_scale": "[0, 1]",
        "data": data_label(config.data, config.data_dir),
        **({"not_judged": not_judged} if not_judged else of_densities),
        "standard_errors": "spread over images / sqrt(N)",
        "method": config.method,
        **config.own_settings,
        "likelihood": config.likelihood if config.method == "sampling-free" else None,
        "gamma": config.gamma if config.method == "sampling-free" else None,
        "gamma_schedule": config.gamma_schedule if config.method == "sampling-free" else None,
        "noise_var": config.noise_var,
        "learned_noise_var": config.learned_noise_var,
        "kl_weight": config.kl_weight,
        "kl_weight_schedule": config.kl_weight_schedule,
        "samples": config.samples,
        "draws": config.draws,
        "training_proposal": config.proposal,
        "warm_start": config.warm_start or "none",
        "output_activation": config.output_activation,
        "init": config.init,
        "seed": config.seed,
        "steps": config.steps,
        "torch": torch.__version__,
        "fastsfvae": VERSION,
        "commit": commit(),
    }


def constant(config: TrainConfig) -> float:
    """-(n/2) log(2 pi c), in nats: the part of every log-density that no model changes."""
    n = math.prod(config.model_config.image_shape)
    return -0.5 * n * math.log(2 * math.pi * config.noise_var)


def table(report: Report, config: TrainConfig) -> str:
    """Lay out a report as plain text."""
    lines = [("", "train", "test"), *rows(report, config)]
    laid_out = [f"{label:42}{train:>19}{test:>19}".rstrip() for label, train, test in lines]
    return "\n".join([*laid_out, "", *notes(report, config)])


def rows(report: Report, config: TrainConfig) -> list[tuple[str, str, str]]:
    """A report's quantities: a label, and the values on both splits."""
    offset = constant(config)
    names = {
        "objective": "objective (not a bound)" if config.method == "sampling-free" else "objective",
        "sampled ELBO": "sampled ELBO",
        "log ML": "log ML",
    }
    log_density = [(label, name, 0.0) for name, label in names.items()]
    without = [(f"{label}, without constant", name, offset) for name, label in names.items()]
    rest = [
        (name, name, 0.0) for name in ("KL", "squared error at the mean", "squared error, sampled")
    ]

    def cell(split: str, name: str, shift: float) -> str:
        value = report.splits[split].get(name)
        return f"{value.mean - shift:10.2f} ± {value.standard_error:<6.2f}" if value else "-"

    return [
        (label, cell("train", name, shift), cell("test", name, shift))
        for label, name, shift in (*log_density, *without, *rest)
    ]


def notes(report: Report, config: TrainConfig) -> list[str]:
    """What a report's quantities mean, in lines."""
    c = report.conventions
    sampling_free = config.method == "sampling-free"
    reading = f", likelihood {config.likelihood}" if sampling_free else ""
    reading += "".join(f", {name} {value}" for name, value in config.own_settings.items())
    if sampling_free and config.likelihood != "expected":
        reading += f", gamma {config.gamma:g}"
    if config.draws != "iid":
        reading += f", {config.samples} {config.draws} draws"
    if config.warm_start:
        reading += f", warm start {config.warm_start}"
    learned = " (learned)" if config.learned_noise_var else ""
    collapse = report.collapse
    collapsed = "" if collapse["collapsed"] is None else f", {collapse['collapsed']} collapsed"
    lines = [
        f"{report.steps_per_second:.1f} steps/s ({report.seconds:.1f} s); "
        f"{collapse['active']} of {collapse['latent_dim']} latent dimensions active{collapsed}",
        f"method {config.method}{reading}, c {config.noise_var:g}{learned}, seed {config.seed}; "
        f"pixels in [0, 1]; nats; constant -(n/2) log(2 pi c) = {constant(config):.2f}",
    ]
    if "not_judged" in c:
        return [*lines, f"± is the standard error over images; -: {c['not_judged']}"]
    return [
        *lines,
        f"± is the standard error over images; log ML: {c['log_ml']}, Monte Carlo error "
        f"{report.log_ml_monte_carlo_error:.3f}, estimated bias {report.log_ml_bias:.3f}, "
        f"effective samples {report.median_effective_samples:.0f} (median) and "
        f"{report.smallest_effective_samples:.1f} (smallest)"
        f"{verdict.doubt(report.smallest_effective_samples)}",
        c["log_ml_elsewhere"],
    ]
