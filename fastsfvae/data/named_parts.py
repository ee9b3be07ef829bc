"""Which of a set's own parts are for training and which for testing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from fastsfvae.data.text import printable, some

T = TypeVar("T")

_VALIDATION = ("validation", "valid", "val")


def choose(parts: Mapping[str, T]) -> tuple[list[tuple[str | None, T]], list[str]]:
    """Train and test by their names; validation for test where there is none; else every tenth.

    Args:
        parts: by name, at least one of which is "train" or "test".

    Returns:
        The parts to read, test first, each behind "train", "test" or None (every tenth is for
        testing), and notes of what was not plain.
    """
    notes = []
    test = next((name for name in ("test", *_VALIDATION) if name in parts), None)
    if test not in (None, "test"):
        notes.append(f"there is no test part: {test} is taken for testing")
    taken = {"test": test, "train": "train" if "train" in parts else None}
    if test is None:
        notes.append("there is no test part: every tenth image of train is for testing")
    if rest := [printable(name) for name in parts if name not in taken.values()]:
        notes.append(f"not read are the parts {some(rest)}")
    chosen = [(None if test is None else to, parts[name]) for to, name in taken.items() if name]
    return chosen, notes
