"""Gradients whose kernels leave parts of sums, added up once for all samples of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastsfvae.kernels._stack_sums import Partial, Sum


class PartialSums:
    """The parts of all such gradients of a sweep.

    Args:
        wants: whether a tensor's gradient is wanted, asked each time that there are parts of it.
    """

    def __init__(self, wants: Callable[[Tensor], bool] = lambda tensor: True):
        self.wants = wants
        # By the tensor's id, beside the tensor, so that the id stays its own.
        self._partial: dict[int, tuple[Tensor, Partial]] = {}

    def rooms(self, tensor: Tensor) -> Partial:
        """Where kernels leave parts of a tensor's gradient, in channels-last order."""
        from fastsfvae.kernels._stack_sums import Partial

        if id(tensor) not in self._partial:
            self._partial[id(tensor)] = tensor, Partial(tensor.numel(), tensor.device)
        return self._partial[id(tensor)][1]

    def add_up(self) -> list[tuple[Tensor, Tensor]]:
        """Tensors with their gradients, in their dtype and where it is dense their memory order."""
        from fastsfvae.kernels._stack_sums import add_up

        found = [
            (tensor, _sum_of(tensor, partial.parts))
            for tensor, partial in self._partial.values()
            if len(partial.parts) and self.wants(tensor)
        ]
        self._partial.clear()
        add_up([of for _, of in found])
        return [(tensor, of.out) for tensor, of in found]


def _sum_of(tensor: Tensor, parts: Tensor) -> Sum:
    from fastsfvae.kernels._stack_sums import Sum

    out, order = torch.empty_like(tensor), torch.contiguous_format
    if tensor.ndim != 4:
        return Sum(parts, torch.empty_like(tensor, memory_format=order))
    if out.is_contiguous(memory_format=torch.channels_last):
        return Sum(parts, out)
    # Of a third order the caller makes its own of this.
    out = torch.empty_like(tensor, memory_format=order)
    return Sum(parts, out, out[0, 0].numel(), out.shape[1])
