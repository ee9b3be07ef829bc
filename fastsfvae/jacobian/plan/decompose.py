"""Which composite operations a trace takes apart: those that have no rule of their own.

Their parts are PyTorch's own, so is what they compute; only the parts need rules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.catalogue import NOT_DIFFERENTIABLE
from fastsfvae.jacobian.rules.registry import RULES

# They look at memory, at devices or at values, or have parts of which no trace knows.
_WHOLE = frozenset("data pin_memory requires_grad_ pad_sequence argwhere nonzero_numpy".split())
_FOREIGN = ("sparse", "quantize", "fbgemm", "mkldnn", "nested")


def composites() -> dict[Any, Callable[..., Any]]:
    """What takes an operation apart, by overload, for the rules that there are now."""
    table: dict[Any, Callable[..., Any]] = {}
    for overload in _known():
        name = overload._schema.name.partition("::")[2]
        # In place it is written as its out-of-place form, which may have a rule.
        if {name, name.removesuffix("_")}.isdisjoint(RULES):
            table[overload] = overload.decompose
    return table | {torch.ops.aten.masked_select.default: _entries_of_each_sample}


@functools.cache
def _known() -> tuple[Any, ...]:
    key = "CompositeImplicitAutograd"
    found = []
    for full_name in torch._C._dispatch_get_registrations_for_dispatch_key(key):
        namespace, _, rest = full_name.partition("::")
        name, _, overload = rest.partition(".")
        left_whole = name.startswith("_") or name in _WHOLE | NOT_DIFFERENTIABLE
        if namespace != "aten" or left_whole or any(word in name for word in _FOREIGN):
            continue
        operation = getattr(getattr(torch.ops.aten, name), overload or "default")
        returns = operation._schema.returns
        # With `out=` it writes into memory that the caller gave.
        if "out" not in overload and any("Tensor" in str(r.type) for r in returns):
            found.append(operation)
    return tuple(found)


def _entries_of_each_sample(x: Tensor, mask: Tensor) -> Tensor:
    """torch.masked_select as an index, where it takes the same entries of each sample."""
    if mask.ndim >= x.ndim or x.ndim < 2:
        return NotImplemented
    behind = x.ndim - mask.ndim
    shape = torch.broadcast_shapes(x.shape[behind:], mask.shape)
    x = x.expand(*x.shape[:behind], *shape)
    return x[(slice(None),) * behind + (mask.expand(shape),)].reshape(-1)
