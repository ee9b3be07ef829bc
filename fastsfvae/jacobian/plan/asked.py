"""Values of parameters, buffers and constants that a plan was made for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdRef


class NumberAsked(Exception):
    """A decoder asks for the value of a number that was to be an input."""


class Asked:
    """The values that a decoder asked for while it was traced.

    Args:
        places: which tensors they are of, among those that every method is given.
        tensors: all of them, as they were then.
    """

    def __init__(self, places: Sequence[int] = (), tensors: Sequence[Tensor] = ()):
        self._places = tuple(places)
        self._values = [tensors[place].detach().clone() for place in places]
        self._states = [_state(tensors[place]) for place in places]

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they are still the same; compares them where they may have changed."""
        for index, place in enumerate(self._places):
            state = _state(tensors[place])
            if state != self._states[index]:
                if not torch.equal(tensors[place], self._values[index]):
                    return False
                self._states[index] = state
        return True

    def check(self) -> None:
        """Refuse to go on with other values than a compiled function was made for.

        Raises:
            RuntimeError: one of the tensors was written to.
        """
        for reference, version in self._states:
            tensor = reference()
            if tensor is not None and not tensor.is_inference() and tensor._version != version:
                raise RuntimeError(
                    "a buffer or constant whose value the decoder asks for has changed: call "
                    "torch.compiler.reset(), or the loss outside the compiled function"
                )


def _state(tensor: Tensor) -> tuple[WeakIdRef, Any]:
    # An inference tensor counts no changes: it is compared each time.
    return WeakIdRef(tensor), object() if tensor.is_inference() else tensor._version
