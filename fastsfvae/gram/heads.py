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
    """Gradients of a chunk's Gram, and of the head's inputs in order; None where none is wanted."""

    gram: Pulled
    inputs: tuple[Tensor | None, ...] = ()


class Head(Protocol):
    """See the module.

    Attributes:
        along: for each of its further inputs, whether it has the batch axis.
        fresh: whether each of its outputs is memory that nothing else refers to.
    """

    along: tuple[bool, ...]
    fresh: bool

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

    def find(
        self,
        gram: ChunkGram,
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor] | None = None,
    ) -> Found:
        """The outputs of a chunk.

        Args:
            gram: of the chunk.
            inputs: in float32 at least.
            cotangents: those that `pull` will be given, where they are known so early.
        """

    def pull(
        self,
        gram: ChunkGram,
        found: Found,
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> Gradients:
        """The gradients.

        Args:
            gram: as in `find`.
            found: what it returned.
            inputs: as there.
            cotangents: of the outputs; those of the last ones may be missing, and are then 0.
            needs: for each of the inputs, whether its gradient is wanted.
        """

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
