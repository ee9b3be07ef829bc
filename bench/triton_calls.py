"""Launches of Triton kernels as they are made, on a device or in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Call:
    """One launch that is about to be made.

    Attributes:
        kernel: its name.
        function: the Python function that it was compiled from.
        grid: programs along each axis.
        arguments: by name, constexprs among them.
        options: num_warps and the like.
    """

    kernel: str
    function: Callable
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, the parts of a tuple as "name.0" and so on."""
        found = {}
        for name, value in self.arguments.items():
            several = isinstance(value, tuple)
            for at, part in enumerate(value if several else (value,)):
                if isinstance(part, Tensor):
                    found[f"{name}.{at}" if several else name] = part
        return found

    @property
    def moved(self) -> int:
        """Bytes of all tensors, each once."""
        tensors = self.tensors.values()
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


@contextmanager
def intercepted(around: Callable[[Call, Callable[[], Any]], Any]) -> Iterator[None]:
    """Have every launch inside a block made by ``around(call, go)``, which calls ``go()``."""
    run, execute = JITFunction.run, interpreter.GridExecutor.__call__

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        def go() -> Any:
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)

        return around(_call(self.fn, self.arg_names, grid, args, kwargs), go)

    def interpreted(self: Any, *args: Any, **kwargs: Any) -> Any:
        def go() -> Any:
            return execute(self, *args, **kwargs)

        return around(_call(self.fn, self.arg_names, self.grid, args, kwargs), go)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", compiled))
        patched = mock.patch.object(interpreter.GridExecutor, "__call__", interpreted)
        stack.enter_context(patched)
        yield


def _call(function: Any, names: list[str], grid: Any, args: tuple, kwargs: dict) -> Call:
    given = dict(zip(names, args, strict=False))
    arguments = given | {name: kwargs[name] for name in names if name in kwargs}
    options = {name: value for name, value in kwargs.items() if name not in names}
    sizes = grid(arguments) if callable(grid) else grid
    return Call(function.__name__, function, tuple(sizes), arguments, options)
