"""What the traces of one decoder have told: what its forward writes, and why it is traced again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

# A plan for each of this many values, and the user hears of it.
_MANY = 4


class History:
    """Of one decoder.

    Attributes:
        written: for `fingerprint`, what the decoder's forward writes and no trace has seen it read.
        numbers: places of numbers that have changed since a trace baked them in.
    """

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}
        self.numbers: set[tuple] = set()
        self._given: Mapping[tuple, float] = {}
        self._baked: set[tuple] = set()
        self._places: set[tuple] = set()
        self._read: set[tuple] = set()
        self._last: Mapping[str, tuple[Any, str]] | None = None
        self._changes: dict[str, int] = {}
        self._warned = False

    def lift(self, given: Mapping[tuple, float]) -> bool:
        """Take in the numbers that the next trace would bake in; tells whether others change."""
        before, self._given = self._given, given
        changed = {p for p in given if p in before and given[p] != before[p]}
        changed -= self.numbers | self._baked
        self.numbers |= changed
        return bool(changed)

    def bake_in(self, places: Iterable[tuple]) -> None:
        """Leave numbers whose values the decoder asks for to the key, for good."""
        self._baked.update(places)
        self.numbers -= self._baked

    def learn(self, written: Iterable[tuple], read: Iterable[tuple]) -> bool:
        """Take in what a trace wrote and read, as places; tells whether `written` has changed."""
        self._places.update(written)
        self._read.update(read)
        found: dict[str, dict[str, Any]] = {}
        for place in self._places:
            if any(other[: len(place)] == place for other in self._read):
                continue
            inside: Any = found
            for key in place[:-1]:
                inside = inside.setdefault(key, {})
                if inside is True:
                    break
            else:
                inside[place[-1]] = True
        changed = found != self.written
        self.written = found
        return changed

    def note(self, inputs: Mapping[str, tuple[Any, str]]) -> None:
        """Take in what a trace has baked in, and warn once of what makes it happen again and again.

        Args:
            inputs: by the names that messages use, (stand-in, text).
        """
        last, self._last = self._last, inputs
        if last is None or self._warned:
            return
        for name in [n for n in inputs if n in last and inputs[n][0] != last[n][0]]:
            count = self._changes[name] = self._changes.get(name, 1) + 1
            if count >= _MANY:
                self._warned = True
                warnings.warn(
                    f"the decoder has been traced {count} times as {name} changes (from "
                    f"{last[name][1]} to {inputs[name][1]}), which is slow: make it a 0-d buffer "
                    "or pass it as a 0-d tensor where it is a number, keep it out of the decoder "
                    "where it is none",
                    UserWarning,
                    stacklevel=2,
                )
                return
