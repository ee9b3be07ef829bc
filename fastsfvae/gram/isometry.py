"""The relaxed distortion measure of a decoder, from tr G and tr G^2, with its gradient by hand.

With t = tr G, s = tr G^2 and cotangents a of t and b of s

    M = dG + dG^T = 2 a I + 4 b G

and for the ratio q = s / t^2 of a sample, with N = G / t and a cotangent g,

    M = (4 g / t) (N - q I)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastsfvae import _checks, _constants
from fastsfvae._checks import Backend
from fastsfvae.gram.heads import HEADS, ChunkGram, Found, Gradients, Shape
from fastsfvae.gram.query import Query, head_outputs, weighted_total
from fastsfvae.jacobian.api import jvp, vjp
from fastsfvae.jacobian.backend import resolve_backend
from fastsfvae.jacobian.shared import bind
from fastsfvae.jacobian.validate import Shared, check_latents
from fastsfvae.ops.gram_project import gram_project

_OVER = ("batch", "sample")


class Traces:
    """tr G and tr G^2, each ``[B]`` (see `fastsfvae.gram.heads`)."""

    along: tuple[bool, ...] = ()
    fresh = True

    def shapes(
        self, batch: int, m: int, out: tuple[int, ...], dtype: torch.dtype, sums: torch.dtype
    ) -> list[Shape]:
        """Two of ``[B]``."""
        return [((batch,), sums)] * 2

    def find(
        self,
        gram: ChunkGram,
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor] | None = None,
    ) -> Found:
        """The traces of a chunk."""
        G, _, _ = gram.sums()
        return Found(_traces(G), G)

    def pull(
        self,
        gram: ChunkGram,
        found: Found,
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        needs: Sequence[bool] = (),
    ) -> Gradients:
        """The gradients of a chunk."""
        a, *others = cotangents
        M = sum((4 * b[:, None, None] * found.kept for b in others), torch.zeros_like(found.kept))
        M.diagonal(dim1=-2, dim2=-1).add_(2 * a.unsqueeze(-1))
        return Gradients(gram.pull(M, torch.zeros_like(M[:, 0]), torch.zeros_like(a)))

    def plain(
        self, output: Tensor, J: Tensor, r: Tensor, inputs: Sequence[Tensor], backend: str
    ) -> tuple[Tensor, ...]:
        """The traces by autograd."""
        return _traces(gram_project(J, r, backend)[0])


class Ratio:
    """tr G^2 / (tr G)^2, ``[B]`` (see `fastsfvae.gram.heads`)."""

    along: tuple[bool, ...] = ()
    fresh = True

    def shapes(
        self, batch: int, m: int, out: tuple[int, ...], dtype: torch.dtype, sums: torch.dtype
    ) -> list[Shape]:
        """One of ``[B]``."""
        return [((batch,), sums)]

    def find(
        self,
        gram: ChunkGram,
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor] | None = None,
    ) -> Found:
        """The ratios of a chunk."""
        N, t = _normalised(gram.sums()[0])
        return Found((N.square().sum((-2, -1)),), (N, t))

    def pull(
        self,
        gram: ChunkGram,
        found: Found,
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        needs: Sequence[bool] = (),
    ) -> Gradients:
        """The gradients of a chunk."""
        (g,), (q,), (N, t) = cotangents, found.outputs, found.kept
        M = N.clone()
        M.diagonal(dim1=-2, dim2=-1).sub_(q.unsqueeze(-1))
        M *= (4 * g / t)[:, None, None]
        return Gradients(gram.pull(M, torch.zeros_like(M[:, 0]), torch.zeros_like(g)))

    def plain(
        self, output: Tensor, J: Tensor, r: Tensor, inputs: Sequence[Tensor], backend: str
    ) -> tuple[Tensor, ...]:
        """The ratios by autograd."""
        N, _ = _normalised(gram_project(J, r, backend)[0])
        return (N.square().sum((-2, -1)),)


TRACES, RATIO = "traces", "trace_ratio"
HEADS.update({TRACES: Traces(), RATIO: Ratio()})


def isometry_loss(
    decoder: Callable[..., Tensor],
    z: Tensor,
    *args: Any,
    probes: Tensor | None = None,
    over: Literal["batch", "sample"] = "batch",
    backend: Backend = "auto",
    chunk_size: int | None = None,
    shared: Shared = (),
    **kwargs: Any,
) -> Tensor:
    """The relaxed distortion measure of a decoder (Lee et al., ICLR 2022), without units.

        over="batch"     mean_b tr(G_b^2) / (mean_b tr(G_b))^2        as their code has it
        over="sample"    mean_b tr(G_b^2) / tr(G_b)^2                 blind to each sample's scale

    with G = J^T J, exactly, by gradients written by hand. Never below 1/m. "batch" is 1/m where all
    G_b are one multiple of the identity (the decoder is a scaled isometry at z), "sample" where
    each is a multiple of its own (it is conformal).

    With `probes` v, drawn from N(0, I), it is their estimator: tr G is the mean of |J v|^2 over the
    probes and tr G^2 that of |J^T J v|^2, by `jvp` and `vjp`, whatever m is. Both are without bias,
    their ratio is not, and may lie below 1/m; least so for "batch", which averages first.

    Args:
        decoder: see `decode_with_jacobian`.
        z: latents [B, m].
        *args: further decoder inputs.
        probes: [B, m], or several a sample, [k, B, m], in z's dtype; None for the exact traces.
        over: what the ratio is taken of; "sample" finishes its gradients chunk by chunk while the
            value is computed, "batch" computes the tangents of several chunks twice.
        backend: see `decode_with_jacobian`.
        chunk_size: samples whose tangents exist at one time; None chooses. Changes rounding only.
        shared: see `decode_with_jacobian`.
        **kwargs: further decoder inputs by name.

    Returns:
        The measure, 0-d, in float32 at least; NaN where tr G is 0: the decoder does not move.
        Second order needs over="batch" or probes, and backend "torch" (or "reference").

    Raises:
        TypeError, ValueError, RuntimeError: see `decode_with_jacobian`; another `over`, or probes
            that do not fit z.
    """
    check_latents(z)
    _checks.choice("over", over, _OVER)
    if probes is not None:
        _checks.floating("probes", probes)
        if probes.shape[-2:] != z.shape or probes.dim() > 3 or not len(probes):
            raise ValueError(
                f"probes have shape {tuple(probes.shape)}: give [B, m] or [k, B, m] with k >= 1 "
                f"and the [B, m] of z, {list(z.shape)}"
            )
        several = probes.unsqueeze(0) if probes.dim() == 2 else probes
        settings = {"backend": backend, "chunk_size": chunk_size}
        decoder, args, kwargs = bind(decoder, args, kwargs, shared)
        traces, squares = _estimates(decoder, z, several, args, settings, kwargs)
        return _ratio(traces, squares, over)
    head, resolved = TRACES if over == "batch" else RATIO, resolve_backend(backend, z)
    given = args, kwargs, resolved, chunk_size
    query = Query(head, decoder, z, None, (), *given, shared=shared)
    if over == "batch":
        traces, squares = head_outputs(query)
        return _ratio(traces, squares, over)
    dtype = torch.promote_types(z.dtype, torch.float32)
    weights = _constants.full(z.shape[:1], 1 / len(z), dtype, z.device)
    return weighted_total(query, weights)[0]


def _ratio(traces: Tensor, squares: Tensor, over: str) -> Tensor:
    if over == "batch":
        return squares.mean() / traces.mean().square()
    return (squares / traces.square()).mean()


def _estimates(
    decoder: Callable[..., Tensor],
    z: Tensor,
    probes: Tensor,
    args: tuple,
    settings: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Of tr G and of tr G^2, ``[B]``, by probes ``[k, B, m]``."""
    _, pushed = jvp(decoder, z, probes, *args, **settings, **kwargs)
    _, pulled = vjp(decoder, z, pushed, *args, **kwargs)
    dtype = torch.promote_types(z.dtype, torch.float32)
    squares = [t.to(dtype).flatten(2).square().sum(-1).mean(0) for t in (pushed, pulled)]
    return squares[0], squares[1]


def _traces(G: Tensor) -> tuple[Tensor, Tensor]:
    return G.diagonal(dim1=-2, dim2=-1).sum(-1), G.square().sum((-2, -1))


def _normalised(G: Tensor) -> tuple[Tensor, Tensor]:
    """G / tr G and tr G."""
    t = G.diagonal(dim1=-2, dim2=-1).sum(-1)
    return G / t[:, None, None], t
