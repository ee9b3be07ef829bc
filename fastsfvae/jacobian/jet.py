"""A value together with its m tangents, and the few operations every rule needs on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Jet(NamedTuple):
    """A value and its derivatives along m directions of z.

    Tangent-major: the leading axis counts the directions, so a linear operation folds (m, B) into
    one batch, and any axis of the primal is the next axis of the tangent.

    Attributes:
        primal: the value, [B, ...].
        tangent: [m, B, ...]. Where the second axis has extent 1 and B has not, all samples share
            the same tangents; so they do before the first operation that is not linear.
    """

    primal: Tensor
    tangent: Tensor


def full_tangent(x: Jet) -> Tensor:
    """The tangents as an (expanded) [m, *primal.shape] tensor."""
    shape = (x.tangent.shape[0], *x.primal.shape)
    return x.tangent if x.tangent.shape == shape else x.tangent.expand(shape)


def fold(tangent: Tensor) -> Tensor:
    """Turn [m, B, ...] into [m * B, ...], keeping channels-last storage without a copy."""
    return tangent.flatten(0, 1)


def unfold(folded: Tensor, m: int) -> Tensor:
    """Turn [m * B, ...] back into [m, B, ...]."""
    return folded.view(m, folded.shape[0] // m, *folded.shape[1:])


def primal_of(x: Any) -> Any:
    """The value of a Jet; anything else unchanged."""
    return x.primal if isinstance(x, Jet) else x


def along_last_axes(x: Jet, operation: Callable[[Tensor], Tensor], axes: int) -> Jet:
    """Apply a linear operation that treats all but the last `axes` axes as a batch.

    The tangents' leading axis joins that batch, so one call serves all m of them.
    """
    return Jet(
        operation(x.primal), operation(x.tangent if x.primal.ndim > axes else full_tangent(x))
    )


def align(x: Jet, ndim: int) -> Tensor:
    """The tangents with singleton axes inserted after m, to broadcast against `ndim` axes."""
    missing = ndim - x.primal.ndim
    if missing <= 0:
        return x.tangent
    tangent = full_tangent(x)
    return tangent[(slice(None),) + (None,) * missing]


def broadcast_jet(primal: Tensor, tangent: Tensor) -> Jet:
    """Pair a value with tangents that broadcast to it, in the value's dtype.

    Extents of 1 are expanded, except the batch axis, where 1 means "the same for all samples".
    """
    if tangent.ndim != primal.ndim + 1 or tangent.shape[2:] != primal.shape[1:]:
        batch = tangent.shape[1:2] if tangent.ndim == primal.ndim + 1 else primal.shape[:1]
        tangent = tangent.expand(tangent.shape[0], *batch, *primal.shape[1:])
    return Jet(primal, tangent if tangent.dtype == primal.dtype else tangent.to(primal.dtype))
