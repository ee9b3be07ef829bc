"""Progress with its rate and remaining time: a bar on a terminal, else lines."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastsfvae.ground.options import say

LINE_SECONDS = 5.0


@contextmanager
def counter(label: str, total: int, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Give a callback that is told how many more of `total` things are done.

    Lines are written where stderr is no terminal or rich is not installed; nothing is where it is
    not to be shown, as on all processes but one.
    """
    if not shown:
        yield lambda count: None
        return
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
        if now - self._written < LINE_SECONDS:
            return
        self._written = now
        remaining = (self._total - self._done) * (now - self._started) / self._done
        say(f"{self._label} {self._done}/{self._total}  {remaining:.0f} s left")
