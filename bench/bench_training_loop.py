"""What the training loop costs over its bare step: `python -m bench.bench_training_loop`.

The loop trains as the command does, with its progress line. After each of its steps a twin of the
run takes a bare one (loss, backward, optimizer on a batch at hand), so that a slow spell of the
machine falls on both. What a checkpoint costs is timed apart and spread over the steps between two.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench.ledger import LEDGER, Recorder
from bench.timing import quantiles, wall_ms
from fastsfvae import training
from fastsfvae.data.pixels import to_unit
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.loop import CHECKPOINT_EVERY, LOG_EVERY
from fastsfvae.training.metrics_csv import Row
from fastsfvae.training.monitors import PlainProgress
from fastsfvae.training.run import save

WARM_UP = 5
# Images of the stand-in for CelebA: the loop does not look at what they show.
CELEBA_IMAGES = 512


def digits(folder: Path, steps: int) -> TrainConfig:
    """The command's default."""
    return TrainConfig(steps=steps)


def celeba16(folder: Path, steps: int) -> TrainConfig:
    """The paper's convolutional model on colour images of 64x64."""
    # The converted images go with the folder.
    os.environ["FASTSFVAE_CACHE"] = str(folder)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (CELEBA_IMAGES + 64, 64, 64, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", train=images[:-64], test=images[-64:])
    data = {"data": "npz", "data_dir": str(folder / "images.npz"), "channels": 3, "image_size": 64}
    return TrainConfig(model="conv", steps=steps, **data)


# Steps for half a minute each on two cores.
CASES = {"digits": (digits, 400), "celeba16": (celeba16, 40)}


class Twin:
    """Takes a bare step after each of the loop's and times both, in milliseconds."""

    def __init__(self, run: training.Run) -> None:
        self._run = run
        self._noise = torch.Generator(run.device)
        self._x = to_unit(run.images[: run.config.batch_size])
        self.loop: list[float] = []
        self.bare: list[float] = []
        self._left = time.perf_counter()

    def __call__(self, run: training.Run, row: Row) -> None:
        """Note when the loop's step ended, and take a bare one."""
        self.loop.append((time.perf_counter() - self._left) * 1e3)
        self.bare.append(wall_ms(self._step))
        self._left = time.perf_counter()

    def _step(self) -> None:
        terms = self._run.model(self._x, self._noise)
        self._run.optimizer.zero_grad()
        terms.loss.backward()
        self._run.optimizer.step()


def measure(name: str, steps: int, recorder: Recorder | None) -> float:
    """Print and record one case; return the loop's time over the bare step's."""
    with tempfile.TemporaryDirectory() as folder:
        make, default = CASES[name]
        config = make(Path(folder), steps or default)
        run, other = (training.start(config, Path(folder) / part) for part in ("run", "twin"))
        progress, twin = PlainProgress(run), Twin(other)
        training.train(run, progress, twin)
        checkpoint = min(wall_ms(lambda: save(run)) for _ in range(3))
    loop, bare = twin.loop[WARM_UP:], twin.bare[WARM_UP:]
    ratio = 1 + (_extra(loop, bare) + checkpoint / CHECKPOINT_EVERY) / median(bare)
    timings = {"training loop": quantiles(loop), "bare step": quantiles(bare)}
    for label, timing in timings.items():
        print(f"{name:10s} {label:14s} {timing.p50:9.2f} ms ({timing.p20:.2f} to {timing.p80:.2f})")
    print(
        f"{name:10s} the loop costs {ratio - 1:+.1%}, a checkpoint ({checkpoint:.0f} ms) included"
    )
    if recorder is not None:
        columns = {
            "op": "training_loop",
            "mode": "step",
            "shape": f"{name} B={config.batch_size} m={config.latent_dim}",
            "dtype": config.precision,
        }
        compared = {"ratio": f"{ratio:.4f}", "ratio_to": "bare step", "note": "paired"}
        for label, timing in timings.items():
            more = compared if label == "training loop" else {}
            recorder.write(timing, implementation=label, **columns, **more)
    return ratio


def _extra(loop: list[float], bare: list[float]) -> float:
    """Milliseconds that the loop adds to a step, its share of a row's writing included.

    A median of paired differences: a machine's slow spells leave it alone.
    """
    pairs = enumerate(zip(loop, bare, strict=True), start=WARM_UP + 1)
    usual, writing = [], []
    for step, (ours, theirs) in pairs:
        (writing if step % LOG_EVERY == 0 else usual).append(ours - theirs)
    row = median(writing) - median(usual)
    return median(usual) + row / LOG_EVERY


def main() -> None:
    """Measure the cases that are asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.bench_training_loop", description=__doc__
    )
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--steps", type=int, default=0, help="default: half a minute's")
    parser.add_argument("--no-ledger", action="store_true")
    options = parser.parse_args()
    recorder = None if options.no_ledger else Recorder(LEDGER, "cpu")
    for name in options.case or CASES:
        measure(name, options.steps, recorder)


if __name__ == "__main__":
    main()
