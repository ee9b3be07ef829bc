"""The log-volume of a decoder, 1/2 log det (J^T J + damping I), with its gradient by hand.

With C = G + cI and a cotangent g of the value, M = dG + dG^T = g C^-1 and dc = g tr(C^-1) / 2.
PyTorch takes M in two factors (`fastsfvae.ops.log_det`), the kernels whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastsfvae import _checks, _constants
from fastsfvae._checks import Backend, Reduction
from fastsfvae.gram.heads import HEADS, ChunkGram, Found, Gradients, Shape
from fastsfvae.gram.query import Query, head_outputs, weighted_total
from fastsfvae.gram.tail import Unwritten
from fastsfvae.jacobian.backend import resolve_backend
from fastsfvae.jacobian.validate import Shared, check_latents
from fastsfvae.ops.log_det import log_det_of_parts, log_det_of_sums


class LogVolume:
    """The log-volume, and 1 where it is lost or else 0, each ``[B]`` (see `fastsfvae.gram.heads`).

    Args:
        damped: whether there is a damping, its only input (0-d).
    """

    fresh = True

    def __init__(self, damped: bool):
        self.along: tuple[bool, ...] = (False,) * damped

    def shapes(
        self, batch: int, m: int, out: tuple[int, ...], dtype: torch.dtype, sums: torch.dtype
    ) -> list[Shape]:
        """Two of ``[B]``."""
        # The mark is a number: torch.func refuses outputs that are not.
        return [((batch,), sums)] * 2

    def find(
        self,
        gram: ChunkGram,
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor] | None = None,
    ) -> Found:
        """The log-volumes of a chunk."""
        c, parts = inputs[0] if inputs else None, gram.parts()
        root = inverse = None
        if parts is None:
            assert not isinstance(gram, Unwritten)
            G, _, _ = gram.sums()
            value, root, lost = log_det_of_sums(G, c, gram.scale(), gram.redo())
        else:
            G, _, _ = parts.sums
            value, inverse, lost = log_det_of_parts(parts, c)
        if c is None:
            _refuse_flat(G.shape[-1], gram.n)
        return Found((0.5 * value, lost.to(value.dtype)), (root, inverse))

    def pull(
        self,
        gram: ChunkGram,
        found: Found,
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        needs: Sequence[bool] = (),
    ) -> Gradients:
        """The gradients of a chunk."""
        g, (root, inverse) = cotangents[0], found.kept
        if inverse is None:
            assert not isinstance(gram, Unwritten)
            pulled, trace = gram.pull_root(root, g), root.square().sum((-2, -1))
        else:
            M, trace = g[:, None, None] * inverse, inverse.diagonal(dim1=-2, dim2=-1).sum(-1)
            pulled = gram.pull(M, torch.zeros_like(M[:, 0]), torch.zeros_like(g))
        of_damping = 0.5 * (g * trace).sum() if any(needs) else None
        return Gradients(pulled, (of_damping,) * len(inputs))

    def plain(
        self, output: Tensor, J: Tensor, r: Tensor, inputs: Sequence[Tensor], backend: str
    ) -> tuple[Tensor, ...]:
        """The same by autograd, all of it in float64."""
        _, m, n = J.shape
        dtype, wide = torch.promote_types(J.dtype, torch.float32), J.double()
        info, eye = torch.finfo(wide.dtype), torch.eye(m, dtype=wide.dtype, device=J.device)
        C = wide @ wide.mT
        floor = torch.zeros_like(C[0, 0, 0])
        if inputs:
            C, floor = C + inputs[0].double() * eye, inputs[0].detach().double()
        else:
            _refuse_flat(m, n)
        fixed = C.detach()
        scale, total = fixed.diagonal(dim1=-2, dim2=-1), fixed.diagonal(dim1=-2, dim2=-1).sum(-1)
        chol, failed = torch.linalg.cholesky_ex(fixed)
        d = chol.diagonal(dim1=-2, dim2=-1).square()
        good = (d >= 4 * info.eps * scale) & (d >= floor) & (d >= info.tiny)
        singular = (failed != 0) | ~good.all(-1)
        lost = singular | (d < info.eps**0.5 * scale).any(-1)
        # Positive definite by as much as its rounding, so that no derivative is NaN.
        added = (8 * m * info.eps * total + info.tiny).where(singular, torch.zeros_like(total))
        chol, _ = torch.linalg.cholesky_ex(C + added[:, None, None] * eye)
        value = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if not inputs:
            value = value.masked_fill(singular & total.isfinite(), -torch.inf)
        return value.to(dtype), lost.to(dtype)


HEADS.update({"log_volume": LogVolume(False), "damped_log_volume": LogVolume(True)})


@overload
def log_volume(
    decoder: Callable[..., Tensor],
    z: Tensor,
    *args: Any,
    damping: float | Tensor = 0.0,
    reduction: Reduction = "none",
    return_lost: Literal[False] = False,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    shared: Shared = (),
    **kwargs: Any,
) -> Tensor: ...


@overload
def log_volume(
    decoder: Callable[..., Tensor],
    z: Tensor,
    *args: Any,
    damping: float | Tensor = 0.0,
    reduction: Reduction = "none",
    return_lost: Literal[True],
    backend: Backend = "auto",
    chunk_size: int | None = None,
    shared: Shared = (),
    **kwargs: Any,
) -> tuple[Tensor, Tensor]: ...


@overload
def log_volume(
    decoder: Callable[..., Tensor],
    z: Tensor,
    *args: Any,
    damping: float | Tensor = 0.0,
    reduction: Reduction = "none",
    return_lost: bool,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    shared: Shared = (),
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]: ...


def log_volume(
    decoder: Callable[..., Tensor],
    z: Tensor,
    *args: Any,
    damping: float | Tensor = 0.0,
    reduction: Reduction = "none",
    return_lost: bool = False,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    shared: Shared = (),
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """The logarithm of a decoder's volume element, 1/2 log det (J^T J + damping I), in nats.

    With `damping` 0 the term by which an injective flow's density changes:
    log p(f(z)) = log p(z) - log_volume. Its gradient is exact and written by hand, d = tr(C^-1 dG)
    / 2 with C = G + damping I; nothing is estimated. With reduction "mean" or "sum" it is finished
    chunk by chunk while the value is computed.

    The pivot rule is that of `fastsfvae.ops.woodbury`. A sample that float32 cannot resolve is
    computed again in float64 where its tangents are float32: on the CPU, and on the Triton kernels
    up to m = 64. It is lost where a pivot keeps fewer than half of its digits even so. One that is
    rounding noise altogether counts at the rule's floor with a damping, which bounds the value from
    below; without one the sample is singular: its value is -inf and its gradient 0.

    On the Triton kernels the gradient is a float32 product with C^-1, which needs a condition of J
    below some 50 to keep half of its digits: other samples' values are rescued, not their
    gradients, and they are marked as lost, too. PyTorch's error is eps times that condition.

    Args:
        decoder: see `decode_with_jacobian`.
        z: latents [B, m].
        *args: further decoder inputs.
        damping: added to the eigenvalues of J^T J, in their units; a number >= 0, or a 0-d tensor
            > 0, in which the result is differentiable.
        reduction: "none" ([B]), "mean" or "sum" over the batch (0-d).
        return_lost: also return which samples are lost.
        backend: see `decode_with_jacobian`.
        chunk_size: samples whose tangents exist at one time; None chooses. Changes rounding only.
        shared: see `decode_with_jacobian`.
        **kwargs: further decoder inputs by name.

    Returns:
        The log-volume in float32 at least; with `return_lost` a pair with a bool [B]. Second order
        needs reduction "none" and backend "torch" (or "reference").

    Raises:
        TypeError, ValueError, RuntimeError: see `decode_with_jacobian`; a damping or reduction that
            is none of these; fewer outputs than latents without damping.
    """
    check_latents(z)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    dtype = torch.promote_types(z.dtype, torch.float32)
    if not torch.compiler.is_compiling():
        # A compiler may hold the number as a symbol.
        _checks.damping(damping, dtype)
    inputs: tuple[Tensor, ...] = ()
    if isinstance(damping, Tensor):
        # An alias: it may be one of the decoder's parameters.
        inputs = (damping.to(z.device).view(()),)
    elif damping:
        inputs = (_constants.full((), damping, dtype, z.device),)
    head, resolved = "damped_log_volume" if inputs else "log_volume", resolve_backend(backend, z)
    given = args, kwargs, resolved, chunk_size
    query = Query(head, decoder, z, None, inputs, *given, shared=shared)
    if reduction == "none":
        value, lost = head_outputs(query)
    else:
        share = 1 / len(z) if reduction == "mean" else 1.0
        weights = _constants.full(z.shape[:1], share, dtype, z.device)
        value, (_, lost) = weighted_total(query, weights)
    return (value, lost > 0) if return_lost else value


def _refuse_flat(m: int, n: int) -> None:
    if m > n:
        raise ValueError(
            f"damping=0 with m = {m} latents and n = {n} outputs: J^T J is singular, "
            "give damping > 0"
        )
