"""The registry of tangent rules: one per ATen operation.

A rule carries tangents forward. With an adjoint it also pulls gradients of (value, tangents) back
by hand, so that a sweep over a chunk of samples needs no autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastsfvae._ranges import span
from fastsfvae.jacobian.rules.rule import Rule
from fastsfvae.jacobian.rules.tape import current_tape


class _Rules(dict[str, Rule]):
    """The rules by their operations' names; counts its changes, as plans hold what they found."""

    version = 0

    def __setitem__(self, name: str, rule: Rule) -> None:
        """Add or replace a rule."""
        super().__setitem__(name, rule)
        self.version += 1

    def __delitem__(self, name: str) -> None:
        """Remove a rule."""
        super().__delitem__(name)
        self.version += 1


RULES = _Rules()


def bind(rule: Rule, private: bool = False, label: str = "") -> Callable[..., Any]:
    """The function that runs a rule, and is recorded where a tape is running.

    Args:
        rule: of the operation.
        private: whether nothing else reads the first argument's memory.
        label: its name for a profiler; that of the rule where none is given.
    """
    label = label or rule.name

    def run(*args: Any, **kwargs: Any) -> Any:
        tape = current_tape()
        with span(label):
            try:
                if tape is None:
                    return rule.forward(*args, **kwargs)
                if rule.lean is not None:
                    return tape.record(rule, rule.lean, (private, *args), kwargs, label, skip=1)
                return tape.record(rule, rule.forward, args, kwargs, label)
            except _MISTAKES as error:
                raise RuntimeError(
                    f"the tangent rule of {label} does not know this call "
                    f'({type(error).__name__}: {error}): use backend="reference", and report it'
                ) from error

    return run


# What a call that a rule was not written for ends in.
_MISTAKES = (AttributeError, TypeError, IndexError, KeyError, ValueError, AssertionError)


def rule(
    *names: str,
    triton: Rule | None = None,
    several: bool = False,
    composed: bool = False,
    covers: Callable[..., bool] | None = None,
):
    """Register the decorated function as the rule of the named ATen operations.

    What it returns calls the function, and notes the call where a tape is running: rules may call
    one another.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            if name in RULES:
                raise ValueError(f"there are two tangent rules for {name!r}")
            RULES[name] = Rule(name, function, triton, several, composed, covers=covers)
        return bind(RULES[names[0]])

    return register


def always(args: tuple, kwargs: dict[str, Any]) -> bool:
    """What `covers` is where any argument may be a Jet."""
    return True


def adjoint(
    *names: str,
    covers: Callable[..., bool] | None = None,
    lean: Callable[..., Any] | None = None,
    fresh: bool = False,
    overwrites: bool = False,
):
    """Register the decorated function as the adjoint of the rules of the named operations.

    It is called as ``(grad, out, needs, *args, **kwargs)`` with the rule's arguments and result.
    `grad` is a Jet of gradients of `out`, tangents with `out`'s own extents; for an operation with
    several results it is a tuple with None where a gradient is missing. `needs` has one entry for
    each of args: whether its gradient is wanted (a list for a list). It returns a tuple with the
    gradients of the leading args: a Jet for a Jet, a tensor for a tensor, None for nothing.
    Whatever was broadcast may be left so: the tape sums it and casts it to the argument's dtype.

    Args:
        *names: ATen operations that have rules.
        covers: see `Rule`.
        lean: see `Rule`.
        fresh: see `Rule`.
        overwrites: see `Rule`.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            entry = RULES[name]
            entry.adjoint, entry.covers, entry.lean = function, covers, lean
            entry.fresh, entry.overwrites = fresh, overwrites
            RULES[name] = entry
        return function

    return register
