"""What a card's L2 keeps from one launch to the next: pages of tensors, the last used ones.

A page lies where the recorded step had it in memory, so that a tensor whose memory another one had
before finds that one's pages; a GPU's allocator gives memory out again likewise. Launches go
through all of their tensors side by side, from front to back. What they write goes to memory once,
found or not; what they read does not come from there, where it is found.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastsfvae.kernels._record import stretches_of

# Bytes of each card's L2, by data sheet, and the share of them that earlier launches' tensors have:
# a guess, as lines do not replace one another quite in order.
L2_BYTES = {
    name: mib * 2**20
    for name, mib in {"RTX 3090": 6, "RTX 4090": 72, "RTX 5090": 96, "H100": 50}.items()
}
L2_SHARE = 0.75
PAGE = 4096


class Span(NamedTuple):
    """Memory that a launch goes through.

    Attributes:
        start: its first address.
        bytes: of them.
        written: whether they are written, else only read.
    """

    start: int
    bytes: int
    written: bool


def spans_of(tensor: torch.Tensor, written: bool) -> list[Span]:
    """A tensor's memory, each stretch that is dense on its own."""
    if not tensor.numel():
        return []
    starts, size = stretches_of(tensor)
    return [Span(start, size, written) for start in starts]


class L2Cache:
    """Pages by when they were last used.

    Args:
        size: bytes.
    """

    def __init__(self, size: float):
        self._room = int(size // PAGE)
        self._pages: OrderedDict[int, None] = OrderedDict()

    def found(self, spans: Sequence[Span]) -> int:
        """Bytes of what a launch reads and does not write that are here; all spans are, then."""
        touched = []
        for span in spans:
            if not span.bytes:
                continue
            first, stop = span.start, span.start + span.bytes
            for page in range(first // PAGE, -(-stop // PAGE)):
                here = min(stop, (page + 1) * PAGE) - max(first, page * PAGE)
                touched.append(((page * PAGE - first) / span.bytes, page, here, span.written))
        # Side by side: each tensor's first pages, and so on to the last ones.
        touched.sort()
        total = 0
        for _, page, here, written in touched:
            if page in self._pages:
                self._pages.move_to_end(page)
                total += 0 if written else here
                continue
            self._pages[page] = None
            if len(self._pages) > self._room:
                self._pages.popitem(last=False)
        return total
