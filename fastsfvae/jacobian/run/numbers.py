"""Numbers that change from call to call, as inputs of a plan.

A trace bakes in the numbers among a decoder's attributes and further inputs. One that changes (an
annealed temperature) would lead to a new trace each time; from its first change on it is given to
the trace as a 0-d tensor, out of which the decoder gets a symbol. Where the decoder asks for its
value, as a branch does, it is baked in again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastsfvae.jacobian.plan.fingerprint import modules_with_paths

# A module's path and the attribute, or None and which one of the further inputs.
Place = tuple[Any, Any]
_KINDS = {float: torch.float64, int: torch.int64}


def numbers_of(decoder: Any, leaves: list[Any]) -> dict[Place, int | float]:
    """All numbers that a trace of the decoder bakes in, by their places."""
    found: dict[Place, int | float] = {
        (None, index): leaf for index, leaf in enumerate(leaves) if _is_number(leaf)
    }
    for path, module in _modules(decoder):
        for name, value in module.__dict__.items():
            # Not by a look-up: a class of a user's own may have no hash.
            if type(value) is float or type(value) is int:
                found[path, name] = value
    return found


def _is_number(value: Any) -> bool:
    # By identity: a class may have an odd idea of equality.
    return type(value) is float or type(value) is int


def number_tensor(value: int | float) -> Tensor:
    """A number as what a trace and a plan take it from, exactly."""
    return torch.tensor(value, dtype=_KINDS[type(value)])


def put_numbers(decoder: Any, leaves: list[Any], numbers: Mapping[Place, Tensor]) -> None:
    """Replace them by what the given 0-d tensors hold."""
    modules = dict(_modules(decoder))
    for (path, name), tensor in numbers.items():
        if path is None:
            leaves[name] = tensor.item()
        else:
            modules[path].__dict__[name] = tensor.item()


def _modules(decoder: Any) -> list[tuple[str, nn.Module]]:
    return modules_with_paths(decoder) if isinstance(decoder, nn.Module) else []
