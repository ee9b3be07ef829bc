"""Where a compiler finds a decoder, which it knows by its id."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

known_decoders: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def remember(decoder: Any) -> None:
    """Make a decoder known to a compiler."""
    if isinstance(decoder, nn.Module):
        known_decoders[id(decoder)] = decoder
