"""Training: a plain loop whose state can be saved and resumed exactly.

All randomness is a function of (seed, step): a resumed run sees the same batches and the same noise
as one that was never interrupted. The loop never waits for the device except where it logs.
"""

from __future__ import annotations

import csv
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastsfvae.checkpoint import (
    CHECKPOINT,
    CONFIG,
    load_checkpoint,
    load_config,
    load_modules,
    save_checkpoint,
    write_text,
)
from fastsfvae.config import CHANGEABLE, TrainConfig
from fastsfvae.models import build
from fastsfvae.objectives import (
    AutoEncoder,
    DoublyReparameterized,
    ImportanceWeighted,
    Objective,
    Sampling,
    SamplingFree,
    StickingTheLanding,
    Terms,
)

METRICS = "metrics.csv"
FAILED = "failed.pt"
COLUMNS = ("step", "seconds", *Terms._fields)
LOG_EVERY = 25
CHECKPOINT_EVERY = 500

# Streams of random numbers that must not resemble each other under one seed.
_WEIGHTS, _ORDER, _NOISE, _EVALUATION = range(4)

Row = dict[str, float]


class NonFiniteLoss(RuntimeError):
    """Training stopped at a loss that is NaN or infinite."""


@dataclass
class Run:
    """Everything that a training step reads or changes.

    Attributes:
        folder: where its files lie.
        config: what is trained.
        device: where the modules and the images lie.
        encoder: x -> (mean, log_var).
        decoder: z -> x.
        objective: called with every batch.
        optimizer: of the encoder and the decoder.
        images: training images, uint8 ``[N, C, H, W]``.
        step: optimiser steps done.
        seconds: time spent training.
        window: terms of the steps since the last row of metrics.csv, ``[len(Terms)]`` each, on the
            device: reading them every step would make the host wait for it.
    """

    folder: Path
    config: TrainConfig
    device: torch.device
    encoder: nn.Module
    decoder: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    images: Tensor
    step: int = 0
    seconds: float = 0.0
    window: list[Tensor] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.config.steps


def start(config: TrainConfig, out: str | os.PathLike[str] | None = None) -> Run:
    """Prepare a new run; the folder is made only when everything else has succeeded.

    Args:
        config: what to train.
        out: the run's folder, which must not exist; None takes the first free
            ``runs/<method>-<model>-<number>``.

    Raises:
        TypeError, ValueError, RuntimeError: for a configuration, model or device that does not
            work, in one line.
        FileExistsError: where `out` exists.
    """
    folder = Path(out) if out is not None else _free_folder(config)
    if folder.exists():
        raise FileExistsError(
            f"--out {folder} exists: give another folder, or continue it with --resume"
        )
    run = _prepare(config, folder)
    folder.mkdir(parents=True)
    write_text(folder / CONFIG, config.to_json())
    write_text(folder / METRICS, ",".join(COLUMNS) + "\n")
    return run


def resume(folder: str | os.PathLike[str], config: TrainConfig | None = None) -> Run:
    """Take up a run at its last checkpoint, exactly as if it had not been interrupted.

    Args:
        folder: the run's folder.
        config: the run's own with other `steps`, `device` or `backend`; None keeps all.

    Raises:
        ValueError: for a folder without a run, a damaged or foreign file, or a changed setting.
    """
    folder = Path(folder)
    saved = load_config(folder)
    config = saved if config is None else config
    for name, value in vars(saved).items():
        if name not in CHANGEABLE and getattr(config, name) != value:
            raise ValueError(
                f"{name}={getattr(config, name)!r} but {folder} was trained with {value!r}: "
                f"only {', '.join(CHANGEABLE)} can change on --resume"
            )
    state = load_checkpoint(folder / CHECKPOINT)
    run = _prepare(config, folder)
    _restore(run, state)
    if run.step > config.steps:
        raise ValueError(f"steps={config.steps} but {folder} is already at step {run.step}")
    write_text(folder / CONFIG, config.to_json())
    _truncate_metrics(folder / METRICS, run.step)
    return run


def train(run: Run, on_step: Callable[[Run, Row], None] | None = None) -> None:
    """Train until all steps are done or Ctrl-C is pressed; save the state either way.

    Args:
        run: changed in place.
        on_step: called after every step with the run and the last row of metrics.csv.

    Raises:
        NonFiniteLoss: at a NaN or infinite loss, with its step and terms. The state is then in
            failed.pt and the last good one still in checkpoint.pt.
    """
    run.encoder.train()
    run.decoder.train()
    noise = torch.Generator(run.device)
    config, row = run.config, Row()
    started = time.perf_counter() - run.seconds
    batches = iterate_batches(run.images, config.batch_size, config.seed, run.step)
    with _deferred_interrupt() as interrupted, (run.folder / METRICS).open("a", newline="") as file:
        metrics = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        while not run.finished and not interrupted.is_set():
            x = next(batches)
            noise.manual_seed(_seed(config.seed, _NOISE, run.step))
            terms = run.objective(x, *run.encoder(x), generator=noise)
            run.optimizer.zero_grad()
            terms.loss.backward()
            run.optimizer.step()

            run.step += 1
            run.window.append(torch.stack([term.detach().mean() for term in terms]))
            if run.step % LOG_EVERY == 0 or run.finished:
                run.seconds = time.perf_counter() - started
                row = _close_window(run)
                metrics.writerow(row)
                file.flush()
            if run.step % CHECKPOINT_EVERY == 0:
                save(run)
            if on_step is not None:
                on_step(run, row)
    run.seconds = time.perf_counter() - started
    # An interrupted window may hold a step that must not replace the last good checkpoint.
    _read_window(run)
    save(run)


def iterate_batches(
    images: Tensor, batch_size: int, seed: int, first_step: int = 0
) -> Iterator[Tensor]:
    """Yield batches in [0, 1], float32 ``[B, C, H, W]``, for the steps from `first_step` on.

    Each epoch is a permutation of the images that (seed, epoch) determines; its incomplete last
    batch is left out.
    """
    per_epoch = len(images) // batch_size
    first_epoch, done = divmod(first_step, per_epoch)
    for epoch in count(first_epoch):
        generator = torch.Generator().manual_seed(_seed(seed, _ORDER, epoch))
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for batch in range(done, per_epoch):
            yield to_unit(images[order[batch * batch_size : (batch + 1) * batch_size]])
        done = 0


def to_unit(images: Tensor) -> Tensor:
    """Turn uint8 pixels into float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


def evaluation_generator(config: TrainConfig, device: torch.device) -> torch.Generator:
    """The noise of a run's final evaluation, apart from all that it was trained with."""
    return torch.Generator(device).manual_seed(_seed(config.seed, _EVALUATION, 0))


def make_objective(config: TrainConfig, decoder: nn.Module) -> Objective:
    """Build the objective that a configuration names."""
    c, samples = config.noise_var, config.samples
    match config.method:
        case "sampling" | "beta-vae":
            return Sampling(decoder, noise_var=c, kl_weight=config.kl_weight, samples=samples)
        case "auto-encoder":
            return AutoEncoder(decoder, noise_var=c)
        case "iwae":
            return ImportanceWeighted(decoder, noise_var=c, samples=samples)
        case "stl":
            return StickingTheLanding(decoder, noise_var=c)
        case "dreg":
            return DoublyReparameterized(decoder, noise_var=c, samples=samples)
    return SamplingFree(
        decoder,
        noise_var=c,
        gamma=config.gamma,
        kl_weight=config.kl_weight,
        likelihood=config.likelihood,
        backend=config.backend,
    )


def save(run: Run, name: str = CHECKPOINT) -> None:
    """Write the run's state into its folder, atomically."""
    save_checkpoint(
        run.folder / name,
        {
            "encoder": run.encoder.state_dict(),
            "decoder": run.decoder.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "step": run.step,
            "seconds": run.seconds,
            "window": run.window,
            # Batches and noise follow from the step; this is for a model's own, e.g. a Dropout.
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(run.device) if run.images.is_cuda else None,
        },
    )


def _restore(run: Run, state: dict) -> None:
    path = run.folder / CHECKPOINT
    load_modules(path, state, encoder=run.encoder, decoder=run.decoder)
    try:
        run.optimizer.load_state_dict(state["optimizer"])
        run.step, run.seconds = int(state["step"]), float(state["seconds"])
        run.window = [terms.to(run.device) for terms in state["window"]]
        torch.set_rng_state(state["rng"])
        if run.images.is_cuda and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], run.device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold the state of a training run: {error!r}") from error


def _prepare(config: TrainConfig, folder: Path) -> Run:
    device = config.resolve_device()
    images = config.load_images("train")
    # A set that cannot be tested on should say so before anything is trained.
    config.load_images("test")
    if config.batch_size > len(images):
        raise ValueError(
            f"batch_size={config.batch_size} but there are {len(images)} training images"
        )
    torch.manual_seed(_seed(config.seed, _WEIGHTS, 0))
    encoder, decoder = (module.to(device) for module in build(config.model_config))
    objective = make_objective(config, decoder)
    if config.method == "sampling-free":
        # A decoder or backend that cannot run should say so before anything is written.
        z = torch.zeros(2, config.latent_dim, device=device)
        objective(to_unit(images[:2].to(device)), z, z)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=config.lr, fused=True)
    return Run(folder, config, device, encoder, decoder, objective, optimizer, images.to(device))


def _close_window(run: Run) -> Row:
    """Average the window into a row and empty it."""
    means = np.mean(_read_window(run), axis=0).tolist()
    run.window.clear()
    row = {"step": run.step, "seconds": round(run.seconds, 3)}
    return row | dict(zip(Terms._fields, means, strict=True))


def _read_window(run: Run) -> list[list[float]]:
    """Fetch the window's terms; save the state and raise at the first non-finite step."""
    steps = torch.stack(run.window).tolist() if run.window else []
    for step, values in enumerate(steps, start=run.step - len(steps) + 1):
        if not all(map(math.isfinite, values)):
            save(run, FAILED)
            terms = ", ".join(f"{k}={v:g}" for k, v in zip(Terms._fields, values, strict=True))
            raise NonFiniteLoss(
                f"the loss is not finite at step {step} ({terms}): try a smaller --lr or a "
                f"larger --noise-var; the state is in {run.folder / FAILED}"
            )
    return steps


def _truncate_metrics(path: Path, step: int) -> None:
    """Drop the rows that were written after the checkpoint: those steps are done again."""
    header, *rows = path.read_text().splitlines() if path.is_file() else [",".join(COLUMNS)]
    kept = [row for row in rows if int(row.split(",")[0]) <= step]
    write_text(path, "\n".join([header, *kept]) + "\n")


def _free_folder(config: TrainConfig) -> Path:
    model = config.model.replace(":", "-")
    numbered = (Path("runs") / f"{config.method}-{model}-{number}" for number in count(1))
    return next(folder for folder in numbered if not folder.exists())


def _seed(seed: int, stream: int, index: int) -> int:
    # A mixing hash: neighbouring seeds and steps give unrelated generators.
    (state,) = np.random.SeedSequence((seed, stream, index)).generate_state(1, np.uint64)
    return int(state >> np.uint64(1))


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Let Ctrl-C set an event, so that no step is left half done; a second one stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # Signals reach the main thread only; there is nothing to defer.
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def defer(signum, frame) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, defer)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
