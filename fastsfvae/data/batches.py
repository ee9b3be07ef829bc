"""Batches of an image set on a device: cut from it there, or streamed to it where it is too large.

Both ways give the same batches. A resident set crosses to the device once, as uint8; a step then
copies nothing from the host. A streamed one stays where it lies, usually a memory-mapped file: a
thread gathers the next batches into pinned memory while the device computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch
from torch import Tensor

# Enough to ride out one slow read; each is a batch of uint8.
_AHEAD = 4


class ImageSet:
    """Images that are read on a device.

    Args:
        images: uint8 ``[N, C, H, W]`` on the CPU.
        device: where batches are wanted.
        budget: bytes that the set may take there; a larger one is streamed. None is half of a CUDA
            device's free memory, and no limit on the CPU, where a mapped file is read as it is.

    Attributes:
        device: as given.
        streamed: whether the set stayed where it was.
    """

    def __init__(
        self, images: Tensor, device: torch.device | str, budget: int | None = None
    ) -> None:
        self.device = torch.device(device)
        if budget is None and self.device.type == "cuda":
            budget = torch.cuda.mem_get_info(self.device)[0] // 2
        self.streamed = budget is not None and images.nbytes > budget
        self._images = images if self.streamed else images.to(self.device)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: slice) -> Tensor:
        """Some of the images, uint8 ``[b, C, H, W]`` on the device."""
        return self._images[index].to(self.device)

    def batches(self, orders: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield batches, uint8 ``[B, C, H, W]`` on the device, in the order given.

        Args:
            orders: numbers of images, int64 ``[steps, B]`` on the CPU, e.g. an epoch each.
        """
        if self.streamed:
            yield from self._stream(orders)
            return
        for order in orders:
            for numbers in order.to(self.device):
                yield self._images[numbers]

    def _stream(self, orders: Iterable[Tensor]) -> Iterator[Tensor]:
        steps = (numbers for order in orders for numbers in order)
        # torch gathers without holding the interpreter's lock: the training thread goes on.
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
            pending: deque[Future[Tensor]] = deque()
            pending.extend(thread.submit(self._gather, step) for step in islice(steps, _AHEAD))
            while pending:
                batch = pending.popleft().result()
                pending.extend(thread.submit(self._gather, step) for step in islice(steps, 1))
                # From pinned memory the host does not wait for the copy. torch gives the memory to
                # no other batch before it is over.
                yield batch.to(self.device, non_blocking=True)

    def _gather(self, numbers: Tensor) -> Tensor:
        batch = self._images[numbers]
        return batch.pin_memory() if self.device.type == "cuda" else batch
