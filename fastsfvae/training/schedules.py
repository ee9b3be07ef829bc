"""What changes while training: weights of the objective, and the objective itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from fastsfvae import _checks

KINDS = ("constant", "steps", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A pure function of the step.

    Attributes:
        kind: "constant", "steps" (phases of equal length, as in the paper's Figure 1), "linear" or
            "cosine" (the way from each value to the next, all ways equally long).
        values: the values passed, the last of which is reached at step length - 1 and kept.
        length: steps that it takes.
    """

    kind: str
    values: tuple[float, ...]
    length: int

    @classmethod
    def parse(cls, name: str, text: str, last: float, length: int) -> Schedule:
        """Read "constant", "steps:0.95,0.67", "linear:0.95", ...: the values before `last`.

        Args:
            name: the setting that `text` belongs to, for error messages.
            text: see above.
            last: the value at the end, or throughout.
            length: steps that it takes.

        Raises:
            ValueError: for a text of another form.
        """
        kind, _, listed = text.partition(":")
        try:
            before = tuple(float(value) for value in listed.split(",")) if listed else ()
        except ValueError:
            kind = ""
        if kind not in KINDS or (kind == "constant") != (not before):
            raise ValueError(
                f"{name}={text!r} is not a schedule: give constant, or the values on the way, "
                "e.g. steps:0.95,0.67 or linear:0.95 or cosine:0.95"
            )
        return cls(kind, (*before, last), length)

    @property
    def constant(self) -> bool:
        """Whether nothing changes."""
        return self.kind == "constant"

    def at(self, step: int) -> float:
        """The value for the step after `step` finished ones."""
        last = len(self.values) - 1
        if step >= self.length - 1:
            return self.values[-1]
        if self.kind == "steps":
            return self.values[step * (last + 1) // self.length]
        way = step / (self.length - 1) * last
        before = int(way)
        share = way - before
        if self.kind == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        start = self.values[before]
        return start + share * (self.values[min(before + 1, last)] - start)


class WarmStart(NamedTuple):
    """The first steps of a run, by a sampling-free likelihood.

    Attributes:
        likelihood: its objective's.
        steps: how many; 0 where a run has none.
    """

    likelihood: _checks.Likelihood
    steps: int

    @classmethod
    def parse(cls, text: str) -> WarmStart:
        """Read "precision:100", or "" for none.

        Raises:
            ValueError: for a text of another form.
        """
        likelihood, _, steps = text.partition(":")
        if not text:
            return cls("precision", 0)
        if likelihood not in _checks.LIKELIHOODS or not steps.isdecimal() or int(steps) < 1:
            raise ValueError(
                f"warm_start={text!r} is not LIKELIHOOD:STEPS: give e.g. precision:100 (one of "
                f"{', '.join(_checks.LIKELIHOODS)})"
            )
        return cls(likelihood, int(steps))  # type: ignore[arg-type]
