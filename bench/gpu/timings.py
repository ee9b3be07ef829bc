"""The runbook's parts that run cases, one function each."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import cases_kernels, cases_last_layer, cases_layers, cases_steps
from bench.measure import Case, Context, why
from bench.peers import (
    DECODER_LOSSES,
    EAGER,
    FUSED,
    OURS,
    SAMPLING,
    STEPS,
    TRITON,
    UNFUSED,
)
from bench.problems import products
from bench.timing import Timing
from fastsfvae import training
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.metrics_csv import METRICS

_OURS = TRITON, FUSED, UNFUSED


def headlines(context: Context) -> None:
    """This library in every dtype, the paper's sizes in turn; then both steps."""
    sizes = ["tiny"] if context.quick else ["celeba16", "celeba32", "celeba64"]
    for case in _decoder_losses(context, sizes, _OURS):
        context.run(case)
    for name in sizes:
        for dtype in _dtypes(context):
            steps = cases_steps.training_step(
                context.device, [name], dtypes=[dtype], implementations=[SAMPLING, TRITON]
            )
            baseline: dict[str, Timing] = {}
            for case in steps:
                timings = context.run(case, baseline)
                if case.implementation == SAMPLING:
                    baseline = timings


def peers(context: Context) -> None:
    """Everybody else's loss and step, the cheapest first; nothing is compiled."""
    sizes = ["tiny"] if context.quick else ["celeba16", "celeba32", "celeba64"]
    others = [name for name in EAGER if name not in _OURS]
    for case in _decoder_losses(context, sizes, others):
        context.run(case)
    others = [name for name in STEPS if name not in (SAMPLING, TRITON)]
    for case in cases_steps.training_step(context.device, sizes[:1], implementations=others):
        context.run(case)


def compiled_peers(context: Context) -> None:
    """Compiling takes a minute each: once."""
    names = [name for name in DECODER_LOSSES if name not in EAGER][-1 if context.quick else 0 :]
    sizes, dtypes = (["tiny"], ["float32"]) if context.quick else (["celeba16"], ["tf32"])
    for case in cases_steps.decoder_loss(
        context.device, sizes, dtypes=dtypes, implementations=names
    ):
        context.run(case)


def operations(context: Context) -> None:
    """gram_project, woodbury, tangent_activation and the log-density on each backend."""
    given = ["m4"] if context.quick else ["m16", "m64", "m200"]
    layers = ["tiny"] if context.quick else ["celeba16"]
    for case in (
        *cases_kernels.gram_project(context.device, given),
        *cases_kernels.woodbury(context.device, given),
        *cases_kernels.tangent_activation(context.device, layers),
        *cases_kernels.low_rank(context.device, given),
    ):
        if not (context.quick and "compiled" in case.implementation):
            context.run(case)


def layers(context: Context) -> None:
    """Layers of the paper's decoder on the fused kernels and by the library, in every dtype.

    The last one first, with its Gram: it weighs most.
    """
    names, last = cases_layers.LAYERS, cases_last_layer.LAST
    if context.quick:
        names, last = cases_layers.TINY, cases_last_layer.TINY_LAST
    # Interpreted, they differ in little else than their time.
    for dtype in cases_layers.DTYPES[:1] if context.quick else cases_layers.DTYPES:
        for case in (
            *cases_last_layer.last_layers(context.device, list(last), [dtype]),
            *cases_layers.layers(context.device, list(names), [dtype]),
        ):
            context.run(case)


def _dtypes(context: Context) -> Sequence[str]:
    # Interpreted, they differ in little else than their time.
    return ("bfloat16",) if context.quick else cases_steps.PRECISIONS


def _decoder_losses(context: Context, sizes: list[str], names: Sequence[str]) -> Iterator[Case]:
    for size in sizes:
        yield from cases_steps.decoder_loss(
            context.device, [size], dtypes=_dtypes(context), implementations=names
        )


def curves(context: Context) -> None:
    """Train on the digits with each backend: the loss curves must be the same."""
    batch, latents, steps = (4, 2, 3) if context.quick else (64, 16, 500)
    labels = {"op": "training on digits", "mode": "step", "dtype": "float32"}
    labels["shape"] = f"B={batch} n=784 m={latents} mlp steps={steps}"
    ways = {OURS: {"backend": "torch"}, TRITON: {"backend": "triton"}}
    ways[SAMPLING] = {"method": "sampling"}
    found: dict[str, list[float]] = {}
    if all(context.known(labels | {"implementation": name}) for name in ways):
        return
    for name, settings in ways.items():
        config = TrainConfig(
            **{"steps": steps, "device": context.device, **settings},
            batch_size=batch,
            latent_dim=latents,
        )
        base = labels | {"implementation": name}
        with context.running(base):
            try:
                with products("float32"):
                    curve, seconds = _train(config)
            except Exception as reason:
                context.recorder.write(**base, note=why(reason))
                continue
        found[name] = curve
        note = f"loss {curve[0]:.3f} to {curve[-1]:.3f}"
        if name == TRITON and OURS in found:
            pairs = zip(curve, found[OURS], strict=True)
            base["error"] = f"{max(abs(a - b) / abs(b) for a, b in pairs):.2e}"
            note += f"; error is the largest relative distance of its curve to {OURS}'s"
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
