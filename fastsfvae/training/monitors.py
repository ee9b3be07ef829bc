"""What watches a training run: progress, metrics for trackers, pictures."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from fastsfvae.data.pixels import to_unit
from fastsfvae.ground.atomic import replacing
from fastsfvae.ground.options import say
from fastsfvae.ground.progress import LINE_SECONDS
from fastsfvae.training import distributed
from fastsfvae.training.loop import Monitor
from fastsfvae.training.metrics_csv import Row
from fastsfvae.training.run import Run
from fastsfvae.training.tracking import Tracker

Draw = Callable[[Run, Tensor], Any]

_IMAGES = 16


@contextmanager
def monitors(
    run: Run, trackers: Sequence[Tracker] = (), image_every: int = 0, draw: Draw | None = None
) -> Iterator[list[Monitor]]:
    """Give the monitors for `train`; none on a process that does not write.

    Args:
        run: what is trained.
        trackers: what is handed every row of metrics.csv, and every picture.
        image_every: steps between two pictures; 0 draws none.
        draw: makes a picture, a matplotlib figure, of the run and test images ``[N, C, H, W]``.
    """
    if distributed.rank() > 0:
        yield []
        return
    with ExitStack() as stack:
        watching = [stack.enter_context(progress(run))]
        watching += [Scalars(tracker) for tracker in trackers]
        if image_every and draw is not None:
            watching.append(Pictures(run, image_every, draw, trackers))
        yield watching


class PlainProgress:
    """Writes a line to stderr at the first step and every few seconds, for logs and pipes."""

    def __init__(self) -> None:
        self._first_step, self._started, self._written = 0, 0.0, -math.inf

    def __call__(self, run: Run, row: Row) -> None:
        """Report a step; `row` is the last of metrics.csv, empty before the first."""
        now, first = time.monotonic(), not self._started
        if now - self._written < LINE_SECONDS and not run.finished:
            return
        self._written, rate = now, ""
        if first:
            # It traces or compiles: the rate is that of the steps behind it.
            self._first_step, self._started = run.step, now
        else:
            speed = (run.step - self._first_step) / max(now - self._started, 1e-9)
            remaining = (run.config.steps - run.step) / speed
            rate = f"  {speed:.1f} steps/s  {remaining:.0f} s left"
        say(f"step {run.step}/{run.config.steps}{rate}{_describe(row)}")


@contextmanager
def progress(run: Run) -> Iterator:
    """Give the callback for `train`: rich's bar on a terminal, `PlainProgress` elsewhere."""
    if not sys.stderr.isatty():
        yield PlainProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        Remaining(),
        TextColumn("{task.fields[terms]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=run.config.steps, completed=run.step, rate="", terms="")

        def update(run: Run, row: Row) -> None:
            speed = bar.tasks[0].speed
            rate = "" if speed is None else f"{speed:.1f} steps/s"
            bar.update(task, completed=run.step, rate=rate, terms=_describe(row))

        yield update


def _describe(row: Row) -> str:
    if not row:
        return ""
    return (
        f"  objective {row['objective']:.1f}  kl {row['kl']:.1f}  "
        f"squared error {row['squared_error']:.1f}"
    )


class Scalars:
    """Hands every new row of metrics.csv to a tracker."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def __call__(self, run: Run, row: Row) -> None:
        """Hand over the row's terms where the row is this step's."""
        if row.get("step") != run.step:
            return
        values = {name: value for name, value in row.items() if name not in ("step", "seconds")}
        self._tracker.scalars(values, run.step)


class Pictures:
    """Draws the same test images every so many steps, into images/ and for trackers."""

    def __init__(self, run: Run, every: int, draw: Draw, trackers: Sequence[Tracker] = ()) -> None:
        self._every, self._draw, self._trackers = every, draw, trackers
        self._folder = run.folder / "images"
        self._folder.mkdir(exist_ok=True)
        self._images = to_unit(run.config.load_images("test")[:_IMAGES].to(run.device))

    def __call__(self, run: Run, row: Row) -> None:
        """Draw where the step is one of those asked for."""
        if run.step % self._every:
            return
        figure = self._draw(run, self._images)
        with replacing(self._folder / f"step-{run.step:07}.png") as file:
            figure.savefig(file, format="png", dpi=100)
        for tracker in self._trackers:
            tracker.figure("images", figure, run.step)
