"""G = J^T J, p = J^T r and r^T r of a decoder, for a user's own cotangents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsfvae._checks import Backend
from fastsfvae.gram.heads import HEADS, ChunkGram, Found, Gradients, Shape
from fastsfvae.gram.query import Query, head_outputs
from fastsfvae.jacobian.backend import resolve_backend
from fastsfvae.jacobian.validate import Shared, check_tangents, check_target
from fastsfvae.ops.gram_project import gram_project


class Pullback(NamedTuple):
    """What the sampling-free objective needs of a decoder at z.

    Attributes:
        output: f(z), [B, *out].
        gram: G = J^T J, [B, m, m]; along k tangents [B, k, k].
        projection: p = J^T (x - f(z)), [B, m]; None without x. Along tangents [B, k].
        squared_error: |x - f(z)|^2, [B]; None without x.
    """

    output: Tensor
    gram: Tensor
    projection: Tensor | None = None
    squared_error: Tensor | None = None


class Sums:
    """The output and the sums themselves (see `fastsfvae.gram.heads`).

    Args:
        count: 4 for the fields of `Pullback`, 2 for those that need no data.
    """

    along: tuple[bool, ...] = ()
    # The output may be what it was given.
    fresh = False

    def __init__(self, count: int):
        self._count = count

    def shapes(
        self, batch: int, m: int, out: tuple[int, ...], dtype: torch.dtype, sums: torch.dtype
    ) -> list[Shape]:
        """Those of `Pullback`."""
        extents = (batch, m, m), (batch, m), (batch,)
        return [((batch, *out), dtype), *((e, sums) for e in extents)][: self._count]

    def find(
        self,
        gram: ChunkGram,
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor] | None = None,
    ) -> Found:
        """Output and sums of a chunk."""
        return Found((gram.output, *gram.sums())[: self._count])

    def pull(
        self,
        gram: ChunkGram,
        found: Found,
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        needs: Sequence[bool] = (),
    ) -> Gradients:
        """The gradients of a chunk."""
        df, dG, *rest = cotangents
        dp, drr = rest or (torch.zeros_like(dG[:, 0]), torch.zeros_like(dG[:, 0, 0]))
        return Gradients(gram.pull(dG + dG.mT, dp, drr, df))

    def plain(
        self, output: Tensor, J: Tensor, r: Tensor, inputs: Sequence[Tensor], backend: str
    ) -> tuple[Tensor, ...]:
        """Output and sums by autograd."""
        return (output, *gram_project(J, r, backend))[: self._count]


HEADS.update({"sums": Sums(4), "gram": Sums(2)})


def pullback(
    decoder: Callable[..., Tensor],
    z: Tensor,
    x: Tensor | None = None,
    *args: Any,
    tangents: Tensor | None = None,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    shared: Shared = (),
    **kwargs: Any,
) -> Pullback:
    """The m x m quantities G = J^T J, p = J^T r and r^T r at z, with r = x - f(z).

    The Jacobian is held for one chunk of samples at a time; where gradients are needed and there
    are several chunks, it is computed again in the backward, which is written by hand. Decoders
    with an operation that has no adjoint (`check_decoder` names it) are differentiated by autograd
    instead, and so is everything inside torch.func's vmap and forward mode. Differentiable like
    `decode_with_jacobian`.

    Args:
        decoder: see `decode_with_jacobian`.
        z: latents [B, m].
        x: data [B, *out], or None for the Gram matrix alone.
        *args: further decoder inputs.
        tangents: directions V [k, B, m], in z's dtype, for G = V^T J^T J V [B, k, k] and
            p = V^T J^T r [B, k]; None for the unit vectors.
        backend: see `decode_with_jacobian`.
        chunk_size: samples whose tangents exist at one time; None chooses. Changes rounding only.
        shared: see `decode_with_jacobian`.
        **kwargs: further decoder inputs by name.

    Returns:
        A `Pullback`; its sums in float32 at least.

    Raises:
        TypeError, ValueError, RuntimeError: see `decode_with_jacobian`; x that is not floating
            point or does not match the output.
    """
    check_tangents(tangents, z)
    check_target(x, z)
    head, resolved = "gram" if x is None else "sums", resolve_backend(backend, z)
    given = args, kwargs, resolved, chunk_size, tangents, shared
    query = Query(head, decoder, z, x, (), *given)
    return Pullback(*head_outputs(query))
