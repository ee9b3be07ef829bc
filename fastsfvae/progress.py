"""Progress with its rate and remaining time: a bar on a terminal, else lines."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


@contextmanager
def counter(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Give a callback that is told how many more of `total` things are done.

    Lines are written where stderr is no terminal or rich is not installed.
    """
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield _PlainCounter(label, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)


class _PlainCounter:
    """Writes a line to stderr every few seconds: what is over at once is not worth one."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._started = self._written = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._written < _LINE_SECONDS:
            return
        self._written = now
        remaining = (self._total - self._done) * (now - self._started) / self._done
        print(
            f"{self._label} {self._done}/{self._total}  {remaining:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def _describe(row: Row) -> str:
    if not row:
        return ""
    return (
        f"  objective {row['objective']:.1f}  kl {row['kl']:.1f}  "
        f"squared error {row['squared_error']:.1f}"
    )
