"""A value together with its m tangents, and the few operations every rule needs on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsfvae._constants import eye


class Jet(NamedTuple):
    """A value and its derivatives along m directions of z.

    Tangent-major: the leading axis counts the directions, so a linear operation folds (m, B) into
    one batch, and any axis of the primal is the next axis of the tangent.

    Attributes:
        primal: the value, [B, ...].
        tangent: [m, B, ...]. Where the second axis has extent 1 and B has not, all samples share
            the same tangents; so they do before the first operation that is not linear.
        stack: [1 + m, B, ...] where value and tangents lie behind one another in memory, so that a
            linear operation takes both in one call; None elsewhere, and always under autograd.
    """

    primal: Tensor
    tangent: Tensor
    stack: Tensor | None = None


def latent_jet(z: Tensor) -> Jet:
    """Latents with the unit vectors as its tangents."""
    return Jet(z, eye(z.shape[1], z.dtype, z.device)[:, None, :])


def from_stack(stack: Tensor) -> Jet:
    """The Jet whose value and tangents are the slices of ``[1 + m, B, ...]``."""
    return Jet(stack[0], stack[1:], stack)


def stack_of(x: Jet) -> Tensor:
    """Value and tangents of all samples as one ``[1 + m, B, ...]``; copied where they are apart."""
    return torch.cat([x.primal[None], full_tangent(x)]) if x.stack is None else x.stack


def move(x: Jet, operation: Callable[[Tensor, int], Tensor], keeps_batch: bool = True) -> Jet:
    """Apply a linear operation to values and tangents.

    Args:
        x: the Jet.
        operation: called with a tensor and the number of axes in front of the value's own.
        keeps_batch: whether axis 0 stays the batch; tangents that all samples share are expanded
            where not.
    """
    if x.stack is not None:
        return from_stack(operation(x.stack, 1))
    tangent = x.tangent if keeps_batch else full_tangent(x)
    return Jet(operation(x.primal, 0), operation(tangent, 1))


def move_folded(x: Jet, operation: Callable[[Tensor], Tensor]) -> Jet:
    """Apply a linear operation on [N, ...] to the value and, as one batch, to the tangents."""
    if x.stack is not None:
        return from_stack(unfold(operation(fold(x.stack)), x.stack.shape[0]))
    moved = operation(fold(x.tangent))
    return Jet(operation(x.primal), unfold(moved, x.tangent.shape[0]))


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


def sum_over_parts(a: Jet, b: Jet, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A bilinear `product` that sums over leading axes, of values and of tangents, added up."""
    if a.stack is not None and b.stack is not None:
        return product(a.stack, b.stack)
    return product(a.primal, b.primal) + product(a.tangent, b.tangent)


def join(by_value: Tensor, by_tangents: Tensor) -> Tensor:
    """Add up the two parts of a parameter's gradient, both in the axes of the result.

    Tangents that all samples share count once, not once a sample.
    """
    if by_tangents.ndim and by_tangents.shape[0] == 1:
        by_value = by_value.sum(0, keepdim=True)
    return by_value + by_tangents


def primal_of(x: Any) -> Any:
    """The value of a Jet; anything else unchanged."""
    return x.primal if isinstance(x, Jet) else x


def is_differentiable(value: Any) -> bool:
    """Whether it is a tensor that can carry tangents: of real or complex floating point numbers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def conj(value: Any) -> Any:
    """The complex conjugate of a tensor or a number; free for real ones."""
    if isinstance(value, Tensor):
        return value.conj()
    return value.conjugate() if isinstance(value, complex) else value


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype; a real one keeps the real part, in memory of its own."""
    if tensor.is_complex() and not dtype.is_complex:
        tensor = tensor.real.contiguous()
    return tensor.to(dtype)


def is_list(value: Any) -> bool:
    """Whether an argument is several, a list or a tuple; a Jet is a tuple as well, and is one."""
    return isinstance(value, (list, tuple)) and not isinstance(value, Jet)


def flat(args: Iterable[Any]) -> Iterable[Any]:
    """The arguments, with those in lists one by one."""
    for arg in args:
        if is_list(arg):
            yield from arg
        else:
            yield arg


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

    Raises:
        TypeError: a real value with complex tangents: an imaginary part would be lost.
    """
    if tangent.ndim != primal.ndim + 1 or tangent.shape[2:] != primal.shape[1:]:
        batch = tangent.shape[1:2] if tangent.ndim == primal.ndim + 1 else primal.shape[:1]
        tangent = tangent.expand(tangent.shape[0], *batch, *primal.shape[1:])
    if tangent.dtype == primal.dtype:
        return Jet(primal, tangent)
    if tangent.is_complex() and not primal.is_complex():
        raise TypeError("a rule gives a real value complex tangents: please report it")
    return Jet(primal, tangent.to(primal.dtype))
