"""What the GPU runbook runs after the correctness suites and the ceilings, as one function each."""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path

from bench import cases_kernels, cases_layers, cases_steps
from bench.measure import Context, why
from bench.peers import SAMPLING
from bench.problems import products
from bench.timing import Timing
from fastsfvae import training
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.metrics_csv import METRICS


def kernels(context: Context) -> None:
    """gram_project, woodbury and tangent_activation on each backend."""
    given = ["m4"] if context.quick else ["m16", "m64", "m200"]
    layers = ["tiny"] if context.quick else ["celeba16"]
    for case in cases_kernels.gram_project(context.device, given):
        context.run(case)
    for case in cases_kernels.woodbury(context.device, given):
        context.run(case)
    for case in cases_kernels.tangent_activation(context.device, layers):
        context.run(case)


def layers(context: Context) -> None:
    """Each layer of the paper's decoder on the fused kernel and on the library, in every dtype."""
    names = cases_layers.TINY if context.quick else cases_layers.LAYERS
    for case in cases_layers.layers(context.device, list(names)):
        context.run(case)


def loss_only(context: Context) -> None:
    """low_rank_log_prob against its peers."""
    given = ["m4"] if context.quick else ["m16", "m64", "m200"]
    for case in cases_kernels.low_rank(context.device, given):
        if not (context.quick and "compiled" in case.implementation):
            context.run(case)


def decoder_loss(context: Context) -> None:
    """Objective and all gradients of the paper's decoder: celeba16, 32, 64."""
    names = ["tiny"] if context.quick else ["celeba16", "celeba32", "celeba64"]
    for name in names:
        for case in cases_steps.decoder_loss(context.device, [name], dtypes=cases_steps.PRECISIONS):
            # Compiling takes a minute each: once.
            costly = "compiled" in case.implementation
            if not costly or (name, case.dtype) == ("celeba16", "tf32"):
                context.run(case)


def training_step(context: Context) -> None:
    """Encoder, objective, backward and Adam, against the sampling VAE's step."""
    names = ["tiny"] if context.quick else ["celeba16", "celeba64"]
    baseline: dict[str, Timing] = {}
    for case in cases_steps.training_step(context.device, names, dtypes=cases_steps.PRECISIONS):
        if case.implementation == SAMPLING:
            baseline = context.run(case)
        else:
            context.run(case, baseline)


def short_training(context: Context) -> None:
    """Train on the digits with each backend: the loss curves must be the same."""
    steps = 3 if context.quick else 500
    curves: dict[str, list[float]] = {}
    for name, settings in {
        "fastsfvae[torch]": {"backend": "torch"},
        "fastsfvae[triton]": {"backend": "triton"},
        SAMPLING: {"method": "sampling"},
    }.items():
        config = TrainConfig(
            **{"steps": steps, "device": context.device, **settings},
            batch_size=4 if context.quick else 64,
            latent_dim=2 if context.quick else 16,
        )
        base = dict(op="training on digits", implementation=name, mode="step", dtype="float32")
        base["shape"] = f"B={config.batch_size} n=784 m={config.latent_dim} mlp steps={steps}"
        try:
            with products("float32"):
                curve, seconds = _train(config)
        except Exception as reason:
            context.recorder.write(**base, note=why(reason))
            continue
        curves[name] = curve
        note = f"loss {curve[0]:.3f} to {curve[-1]:.3f}"
        first = curves.get("fastsfvae[torch]")
        if first is not None and name == "fastsfvae[triton]":
            worst = max(abs(a - b) / abs(b) for a, b in zip(curve, first, strict=True))
            base["error"] = f"{worst:.2e}"
            note += "; error is the largest relative distance of its curve to fastsfvae[torch]'s"
        # One time for the whole run, compilation included: no quantiles, so not for the ledger.
        note += f"; {seconds / steps * 1e3:.3f} ms a step, the first ones included"
        context.recorder.write(**base, note=note)


def _train(config: TrainConfig) -> tuple[list[float], float]:
    """The windows' mean losses and the seconds of a run."""
    with tempfile.TemporaryDirectory() as folder:
        run = training.start(config, Path(folder) / "run")
        training.train(run)
        with (run.folder / METRICS).open(newline="") as file:
            return [float(row["loss"]) for row in csv.DictReader(file)], run.seconds
