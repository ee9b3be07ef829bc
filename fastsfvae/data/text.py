"""Names and lists as one line of a message."""

from __future__ import annotations

import os
from collections.abc import Sequence


def printable(name: str | os.PathLike[str]) -> str:
    """A file's name in one line of plain text, whatever bytes it is made of."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def some(entries: Sequence[str], most: int = 10) -> str:
    """The first entries, then how many more there are."""
    shown = ", ".join(entries[:most])
    return f"{shown}, and {len(entries) - most} more" if len(entries) > most else shown


def counted(count: int, one: str, many: str) -> str:
    """``3 files are`` or ``1 file is``: a number with the words that follow it."""
    return f"{count:,} {one if count == 1 else many}"
