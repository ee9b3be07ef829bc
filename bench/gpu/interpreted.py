"""Some programs of a launch in Triton's interpreter, in a process of its own.

The interpreter is chosen before Triton is imported, so that it cannot run beside compiled kernels.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.command import ROOT
from bench.triton_calls import Call

# Of one launch, before programs are left out.
SECONDS = 4.0
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Interpreter:
    """The other process.

    Args:
        folder: where launches are handed over.
        programs: of a launch that are run.
    """

    def __init__(self, folder: Path, programs: int = 4):
        self._folder, self._programs = folder, programs

    def __enter__(self) -> Interpreter:
        environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.interpreted"],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def error(self, call: Call, before: dict[str, Any], after: dict[str, Any]) -> tuple[float, int]:
        """How far a launch's results are from the interpreter's.

        Args:
            call: the launch.
            before: its arguments on the host, as they were.
            after: as the launch has left them.

        Returns:
            The largest relative error of a tensor, over what those programs change of it, and how
            many elements they change of all.

        Raises:
            RuntimeError: the interpreter's failure.
        """
        path = self._folder / "launch.pt"
        module = call.function.__globals__["__name__"]
        torch.save((module, call.kernel, call.grid, self._programs, before, after), path)
        assert self._process.stdin and self._process.stdout
        print(path, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline().strip()
        try:
            error, count = answer.split()
            return float(error), int(count)
        except ValueError:
            raise RuntimeError(answer or "the interpreter's process has ended") from None


class _Some:
    """A kernel of which only some programs do anything; to `inspect` it looks like the kernel.

    Those between the first and the last are left out where they would take long.
    """

    def __init__(self, function: Any, programs: Sequence[tuple[int, ...]], builder: Any):
        self.__globals__, self.__name__ = function.__globals__, function.__name__
        self.__signature__ = inspect.signature(function)
        self._function, self._programs, self._builder = function, programs, builder
        self._started = time.monotonic()

    def __call__(self, **arguments: Any) -> None:
        at = tuple(self._builder.grid_idx)
        late = time.monotonic() - self._started > SECONDS
        if at in self._programs and (at == self._programs[-1] or not late):
            self._function(**arguments)


def chosen(grid: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
    """So many programs of a grid in order, the first and the last among them."""
    sizes = (*grid, *(1,) * (3 - len(grid)))
    total = math.prod(sizes)
    wanted = {round(i * (total - 1) / max(1, count - 1)) for i in range(count)}
    every = product(*map(range, sizes))
    return [place for at, place in enumerate(every) if at in wanted]


def run(module: str, kernel: str, grid: tuple, count: int, arguments: dict[str, Any]) -> None:
    """Run some programs on the host's tensors, in place."""
    from triton.runtime import interpreter

    function, builder = (
        getattr(importlib.import_module(module), kernel),
        interpreter.interpreter_builder,
    )
    executor = interpreter.GridExecutor(function.rewrite(), function.arg_names, grid)
    executor.fn = _Some(executor.fn, chosen(grid, count), builder)
    executor(**arguments)


def largest_error(
    before: list[Tensor], wanted: list[Tensor], after: list[Tensor]
) -> tuple[float, int]:
    """Over tensors, relative; of what the interpreter has changed; NaN where anything is NaN.

    The second result is the number of those elements.
    """
    errors, count = [torch.zeros(())], 0
    for old, want, got in zip(before, wanted, after, strict=True):
        # By bits: what was never written may be NaN.
        bits = _BITS[old.element_size()]
        changed = old.view(bits) != want.view(bits)
        if not changed.any():
            continue
        count += int(changed.sum())
        exact, found = want[changed].double(), got[changed].double()
        errors.append(((found - exact).norm() / exact.norm().clamp_min(1e-300)).float())
    return float(torch.stack(errors).max()), count


def _answer(path: str) -> tuple[float, int]:
    module, kernel, grid, count, before, after = torch.load(path, weights_only=False)
    kept = [t.clone() for t in _tensors(before)]
    run(module, kernel, grid, count, before)
    return largest_error(kept, _tensors(before), _tensors(after))


def _tensors(arguments: dict[str, Any]) -> list[Tensor]:
    return [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]


def _lines() -> Iterator[str]:
    for line in sys.stdin:
        yield line.strip()


if __name__ == "__main__":
    for given in _lines():
        try:
            reply = "{} {}".format(*_answer(given))
        except Exception as failure:
            reply = f"{type(failure).__name__}: {failure}".replace("\n", " ")[:300]
        print(reply, flush=True)
