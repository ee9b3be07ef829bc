"""Progress of a training run with its rate and remaining time: a bar on a terminal, else lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fastsfvae.training import Row, Run

_LINE_SECONDS = 5.0


class PlainProgress:
    """Writes a line to stderr every few seconds, for logs and pipes."""

    def __init__(self, run: Run) -> None:
        self._first_step = run.step
        self._started = self._written = time.monotonic()

    def __call__(self, run: Run, row: Row) -> None:
        """Report a step; `row` is the last of metrics.csv, empty before the first."""
        now = time.monotonic()
        if now - self._written < _LINE_SECONDS and not run.finished:
            return
        self._written = now
        rate = (run.step - self._first_step) / max(now - self._started, 1e-9)
        remaining = (run.config.steps - run.step) / rate
        print(
            f"step {run.step}/{run.config.steps}  {rate:.1f} steps/s  "
            f"{remaining:.0f} s left{_describe(row)}",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def progress(run: Run) -> Iterator:
    """Give the callback for `train`: rich's bar on a terminal, `PlainProgress` elsewhere."""
    if not sys.stderr.isatty():
        yield PlainProgress(run)
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
