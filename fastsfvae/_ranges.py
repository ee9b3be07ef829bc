"""Named ranges of a step for profilers, in nvtx and in torch.profiler; nothing while they are off.

`FASTSFVAE_RANGES=1` in the environment turns them on for `nsys profile`, `recording()` for a block
of code under torch.profiler. Names: "encode", "optimizer", "backward", "gram", "solve", the layers
of a decoder by operation and module ("conv_transpose2d 4"), and those with " backward" behind.

Ranges lie on the host. In a step that was captured in a CUDA graph they stand around the capture
and not in its replays, which run no Python and are one range, "replay": to see the parts, profile
the same step with `make_graphed_step(..., capture=False)`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch

ENVIRONMENT = "FASTSFVAE_RANGES"
Function = TypeVar("Function", bound=Callable[..., Any])

_on = os.environ.get(ENVIRONMENT) == "1"
_nothing = contextlib.nullcontext()


def span(*words: str) -> contextlib.AbstractContextManager:
    """A range around a block, named by words that are joined only where it is on."""
    if not _on or torch.compiler.is_compiling():
        return _nothing
    return _range(" ".join(word for word in words if word))


def ranged(name: str) -> Callable[[Function], Function]:
    """Make every call of the decorated function a range."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with span(name):
                return function(*args, **kwargs)

        return cast(Function, run)

    return decorate


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Turn the ranges on inside."""
    global _on
    before, _on = _on, True
    try:
        yield
    finally:
        _on = before


@contextlib.contextmanager
def _range(name: str) -> Iterator[None]:
    with torch.profiler.record_function(name), _annotate(name):
        yield


def _annotate(name: str) -> contextlib.AbstractContextManager:
    # macOS has no CUDA to profile, and there is no nvtx for it.
    if sys.platform == "darwin":
        return _nothing
    # Late: whoever measures nothing does not need it.
    import nvtx

    return nvtx.annotate(name, domain="fastsfvae")
