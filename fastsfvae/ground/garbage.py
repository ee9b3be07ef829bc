"""Python's garbage collection, kept out of where it does harm."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage inside; a context manager for captures of a CUDA graph.

    A collection may finalise what holds memory or a compiled kernel: the driver's call that frees
    it is not allowed while a stream is captured, and ends the capture.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
