"""Heads: what the Gram of a chunk is used for.

A head maps (G, p, rr) of a chunk to outputs and, while the chunk's tangents exist, the outputs'
cotangents to those of G, p and rr, so that gradients are finished chunk by chunk. The operator
knows heads by name: whoever defines one enters it into `HEADS` at import.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastsfvae.gram.contracted import Contracted, ThroughLayer
from fastsfvae.gram.tail import Unwritten
from fastsfvae.gram.written import Pulled, Written

# Where a chunk's (G, p, rr) comes from: J at hand; what goes into a last layer that kernels take
# together with the Gram, or that is linear; or J made behind that one.
ChunkGram = Written | Unwritten | Contracted | ThroughLayer
# Extents and dtype of a tensor.
Shape = tuple[tuple[int, ...], torch.dtype]


class Found(NamedTuple):
    """A chunk's outputs, each with leading extent b, and what `Head.pull` needs besides."""

    outputs: tuple[Tensor, ...]
    kept: Any = None


class Gradients(NamedTuple):
    """Gradients of a chunk's Gram, and of the head's inputs in order."""

    gram: Pulled
    inputs: tuple[Tensor, ...] = ()


class Head(Protocol):
    """See the module.

    Attributes:
        along: for each of its further inputs, whether it has the batch axis.
    """

    along: tuple[bool, ...]

    def shapes(
        self, batch: int, m: int, out: tuple[int, ...], dtype: torch.dtype, sums: torch.dtype
    ) -> list[Shape]:
        """Extents and dtype of each output for a whole batch.

        Args:
            batch: B, perhaps a symbol.
            m: latents.
            out: extents of one sample's f(z).
            dtype: of f(z).
            sums: of G, p and rr, float32 at least.
        """

    def find(self, gram: ChunkGram, inputs: Sequence[Tensor]) -> Found:
        """The outputs of a chunk; inputs in float32 at least."""

    def pull(
        self, gram: ChunkGram, found: Found, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> Gradients:
        """The gradients for cotangents of the outputs."""

    def plain(
        self, output: Tensor, J: Tensor, r: Tensor, inputs: Sequence[Tensor], backend: str
    ) -> tuple[Tensor, ...]:
        """The same outputs by operations that autograd can differentiate.

        Args:
            output: f(z), ``[b, *out]``.
            J: ``[b, m, n]``.
            r: x - f(z), ``[b, n]``; zeros without an x.
            inputs: as in `find`, in any dtype.
            backend: "torch", "triton" or "reference".
        """


HEADS: dict[str, Head] = {}
