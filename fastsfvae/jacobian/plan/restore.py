"""Undo what a forward pass does to its decoder while it is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def restored(decoder: Callable[..., Any]) -> Iterator[None]:
    """Undo what a forward pass writes to its modules' attributes: fake tensors, counters."""
    modules = list(decoder.modules()) if isinstance(decoder, nn.Module) else []
    # functional_call leaves its stand-ins in a module that is registered under two names.
    places = [d for m in modules for d in (m.__dict__, m._parameters, m._buffers)]
    before = [dict(place) for place in places]
    try:
        yield
    finally:
        for place, attributes in zip(places, before, strict=True):
            place.clear()
            place.update(attributes)
