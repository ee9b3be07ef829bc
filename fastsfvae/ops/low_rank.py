"""The primitive (J, r, h, c) -> (log_det, explained, rr), with closed-form adjoints.

Notation, per sample (J is stored tangent-major, [m, n]; the formulas treat it so):

    G = J J^T, p = J r, rr = r^T r, s = sqrt(h), S = diag(s), A = S G S, C = cI + A
    v = S p, w = C^-1 v, y = S w, K = S C^-1 S, q = diag(A C^-1)
    log_det = logdet(I + A/c)            explained = v^T w, with 0 <= explained <= rr

With cotangents g_ld, g_ex, g_rr of the three results:

    dJ = M J + u r^T   and   dr = J^T u + 2 g_rr r,   M = 2 (g_ld K - g_ex y y^T),   u = 2 g_ex y
    dh = g_ld q / h + g_ex c (w / s)^2
    dc = -g_ld sum(q) / c - g_ex |w|^2           since tr C^-1 - m/c = -tr(A C^-1) / c

The likelihood `normalized` needs a second log-determinant, at other latent variances and the same
J: it shares G and its cotangent joins M, so that J is still read once forward and once backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae import reference
from fastsfvae._ranges import ranged
from fastsfvae.kernels._contract import WOODBURY_MAX_M
from fastsfvae.ops._library import differentiate, refuse_vmap
from fastsfvae.ops.gram_project import (
    full_products,
    gram_project_backward,
    gram_project_forward,
)
from fastsfvae.ops.woodbury import (
    Woodbury,
    gram_woodbury_triton,
    woodbury_native,
    woodbury_triton,
)

# From samples that were lost to their sums in float64.
Redo = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class LowRankTerms(NamedTuple):
    """Results of `low_rank_terms`, each ``[B]``.

    Attributes:
        log_det: logdet(I + A/c), in nats.
        explained: v^T C^-1 v, in squared units of the residual; between 0 and `squared_error`.
        squared_error: r^T r.
        second_log_det: logdet(I + A'/c) at `second_var`, or None when that was not given.
        lost: bool, True where a pivot could not be resolved against c, so that the result rests on
            the floor of the pivot rule, or was not finite (after the float64 rescue, where there
            is one).
    """

    log_det: Tensor
    explained: Tensor
    squared_error: Tensor
    second_log_det: Tensor | None
    lost: Tensor


def low_rank_terms(
    jacobian: Tensor,
    residual: Tensor,
    latent_var: Tensor,
    noise_var: Tensor,
    second_var: Tensor | None = None,
    *,
    backend: str = "torch",
) -> LowRankTerms:
    """Evaluate the primitive on validated inputs.

    Args:
        jacobian: J, ``[B, m, n]``, any strides.
        residual: r, ``[B, n]``.
        latent_var: h >= 0, ``[B, m]``.
        noise_var: c > 0, ``[B]``.
        second_var: other latent variances ``[B, m]`` for `second_log_det`.
        backend: "torch", "triton" or "reference" (resolved: not "auto").

    Returns:
        `LowRankTerms`; differentiable in every tensor, to second order unless `backend` is
        "triton".
    """
    # The factorisation and everything behind it is at least float32, whatever J is stored in.
    dtype = torch.promote_types(jacobian.dtype, torch.float32)
    latent_var, noise_var = latent_var.to(dtype), noise_var.to(dtype)
    second_var = None if second_var is None else second_var.to(dtype)
    if backend == "reference":
        return _plain_terms(jacobian, residual, latent_var, noise_var, second_var)
    log_det, explained, rr, second, lost, *_ = _LowRankTerms.apply(
        jacobian, residual, latent_var, noise_var, second_var, backend
    )
    return LowRankTerms(log_det, explained, rr, second, lost)


def _plain_terms(jacobian, residual, latent_var, noise_var, second_var) -> LowRankTerms:
    jacobian, residual = jacobian.to(latent_var.dtype), residual.to(latent_var.dtype)
    log_det, explained, rr = reference.low_rank_terms(jacobian, residual, latent_var, noise_var)
    second = None
    if second_var is not None:
        second = reference.low_rank_terms(jacobian, residual, second_var, noise_var)[0]
    return LowRankTerms(log_det, explained, rr, second, torch.zeros_like(rr, dtype=torch.bool))


class Solved(NamedTuple):
    """Results of `low_rank_forward` and what its adjoints need of it, m x m at most.

    `first` belongs to the latent variances, `second` to the other ones, None without them.
    """

    gram: Tensor
    projection: Tensor
    squared_error: Tensor
    first: Woodbury
    second: Woodbury | None

    @property
    def lost(self) -> Tensor:
        """See `LowRankTerms`."""
        return self.first.lost if self.second is None else self.first.lost | self.second.lost


def low_rank_forward(
    jacobian: Tensor,
    residual: Tensor,
    latent_var: Tensor,
    noise_var: Tensor,
    second_var: Tensor | None,
    backend: str,
) -> Solved:
    """`low_rank_terms` without a graph of its own, for use inside an autograd.Function."""
    if backend == "triton" and jacobian.shape[1] <= WOODBURY_MAX_M:
        sums, first = gram_woodbury_triton(jacobian, residual, latent_var, noise_var)
        second = None
        if second_var is not None:
            rescue = (jacobian, residual) if jacobian.dtype == torch.float32 else ()
            second = woodbury_triton(*sums, second_var, noise_var, *rescue)
        return Solved(*sums, first, second)

    sums, redo = gram_project_forward(jacobian, residual, backend), float64_sums(jacobian, residual)
    return low_rank_of_sums(sums, latent_var, noise_var, second_var, redo)


def float64_sums(jacobian: Tensor, residual: Tensor) -> Redo | None:
    """G, p and rr again, in float64, of the samples whose indices it is given.

    None where J is not float32: rounded tangents cannot be rescued.
    """
    if jacobian.dtype != torch.float32:
        return None
    return lambda lost: reference.gram_project(jacobian[lost].double(), residual[lost].double())


@ranged("solve")
def low_rank_of_sums(
    sums: tuple[Tensor, Tensor, Tensor],
    latent_var: Tensor,
    noise_var: Tensor,
    second_var: Tensor | None,
    redo: Redo | None = None,
) -> Solved:
    """`low_rank_forward` of sums at hand, by PyTorch, with the float64 rescue of lost samples.

    A float32 Gram cannot resolve eigenvalue ratios above 1e7 against c, nor hold any above 1e38.
    Products of float32 numbers are exact in float64, so a lost sample's Gram is formed again there;
    only those samples pay. On CUDA their choice would synchronise with the host, and to redo all
    samples costs more than the step: there the flag alone is returned. (The Triton kernels rescue
    on the device, up to the m that their registers hold.)

    Args:
        sums: G ``[B, m, m]``, p ``[B, m]`` and rr ``[B]``.
        latent_var: as in `low_rank_forward`.
        noise_var: likewise.
        second_var: likewise.
        redo: the sums of samples whose indices it is given, in float64; None where what they are
            made of is not float32.
    """

    def solve(h: Tensor) -> Woodbury:
        solved = woodbury_native(*sums, h, noise_var)
        if redo is None or not solved.lost.is_cpu or not bool(solved.lost.any()):
            return solved
        lost = solved.lost.nonzero().squeeze(-1)
        redone = woodbury_native(*redo(lost), h[lost].double(), noise_var[lost].double())
        for whole, part in zip(solved, redone, strict=True):
            whole[lost] = part.to(whole.dtype)
        # Rounded from float64 it may pass the squared error, which was summed in float32.
        torch.minimum(solved.explained, sums[2], out=solved.explained)
        return solved

    return Solved(*sums, solve(latent_var), None if second_var is None else solve(second_var))


@ranged("solve")
def low_rank_of_partials(
    partials: tuple[Tensor, Tensor, Tensor],
    latent_var: Tensor,
    noise_var: Tensor,
    second_var: Tensor | None,
    redo: Redo | None = None,
) -> Solved:
    """`low_rank_forward` of a Jacobian that was never written, on the Triton kernels.

    Args:
        partials: float32 sums over parts of n, ``(G [S, B, m, m], p [S, B, m], rr [S, B])`` with
            m <= 64.
        latent_var: as in `low_rank_forward`, float32.
        noise_var: likewise.
        second_var: likewise.
        redo: the same sums in float64, of the samples that its argument marks, bool ``[B]``;
            without it a lost sample stays lost.
    """
    from fastsfvae.kernels.woodbury import woodbury_fwd, woodbury_of_partials
    from fastsfvae.kernels.woodbury_float64 import solve_again

    (gram, projection, rr), first = woodbury_of_partials(*partials, latent_var, noise_var)
    if redo is not None:
        solve_again(redo(first.lost), rr, latent_var, noise_var, first)
    second = None
    if second_var is not None:
        second = woodbury_fwd(gram, projection, rr, second_var, noise_var)
        if redo is not None:
            solve_again(redo(second.lost), rr, second_var, noise_var, second)
    return Solved(gram, projection, rr, first, second)


def gram_cotangents(
    solved: Solved, g_ld: Tensor, g_ex: Tensor, g_second: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The module's ``(M [B, m, m], u [B, m])``, which `gram_project_backward` takes.

    Args:
        solved: the forward's result.
        g_ld: cotangent of its log_det, ``[B]``.
        g_ex: of explained.
        g_second: of the second log_det, or None.
    """
    y = solved.first.y
    M = 2 * g_ld[:, None, None] * solved.first.K
    M -= (2 * g_ex[:, None, None] * y.unsqueeze(-1)) * y.unsqueeze(-2)
    if solved.second is not None and g_second is not None:
        M += 2 * g_second[:, None, None] * solved.second.K
    return M, 2 * g_ex.unsqueeze(-1) * y


def variance_gradients(
    solved: Solved,
    variances: tuple[Tensor, Tensor, Tensor | None],
    cotangents: tuple[Tensor, Tensor, Tensor | None],
    needs: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the latent variances ``[B, m]``, of c ``[B]`` and of the second variances.

    Args:
        solved: the forward's result.
        variances: its h ``[B, m]``, c ``[B]`` and second_var ``[B, m]`` or None.
        cotangents: of log_det, explained and the second log_det, each ``[B]``; None without one.
        needs: which of the three are wanted; the others are None.
    """
    h, c, h2 = variances
    g_ld, g_ex, g_second = cotangents
    G, p, first, second = solved.gram, solved.projection, solved.first, solved.second
    dh = dc = dh2 = None
    if needs[0]:
        dh = g_ld.unsqueeze(-1) * _q_over_h(first.q, h, G, first.K, c)
        # The cotangent first: where h is small, the square alone may exceed the dtype.
        ratio = _w_over_s(first.w, h, G, p, first.y, c)
        dh += (g_ex * c).unsqueeze(-1) * ratio * ratio
    if needs[1]:
        dc = -g_ld * first.q.sum(-1) / c - (g_ex.unsqueeze(-1) * first.w * first.w).sum(-1)
        if second is not None and g_second is not None:
            dc = dc - g_second * second.q.sum(-1) / c
    if needs[2] and second is not None and h2 is not None and g_second is not None:
        dh2 = g_second.unsqueeze(-1) * _q_over_h(second.q, h2, G, second.K, c)
    return dh, dc, dh2


class _LowRankTerms(torch.autograd.Function):
    """The boundary between autograd and kernels; outputs after the fifth feed the backward."""

    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(jacobian, residual, latent_var, noise_var, second_var, backend):
        solved = low_rank_forward(jacobian, residual, latent_var, noise_var, second_var, backend)
        first, second = solved.first, solved.second
        return (
            *(first.log_det, first.explained, solved.squared_error),
            *(None if second is None else second.log_det, solved.lost),
            *(solved.gram, solved.projection, first.K, first.y, first.q, first.w),
            *((None,) * 4 if second is None else (second.K, second.y, second.q, second.w)),
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.backend = inputs
        ctx.mark_non_differentiable(*(t for t in output[4:] if t is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[2], *output[5:])

    @staticmethod
    def backward(ctx, g_ld, g_ex, g_rr, g_second, *_):
        *kept, rr, G, p, K, y, q, w, K2, y2, q2, w2 = ctx.saved_tensors
        inputs = tuple(kept)
        if torch.is_grad_enabled():
            # create_graph=True: differentiate the plain formulas instead, which autograd can redo.
            if ctx.backend != "torch":
                raise RuntimeError(
                    f'backend="{ctx.backend}" has first derivatives only; '
                    'second order needs backend="torch" (or "reference")'
                )
            return _plain_backward(ctx.needs_input_grad, inputs, (g_ld, g_ex, g_rr, g_second))
        zero = torch.zeros_like(inputs[3])
        g_ld, g_ex, g_rr = (zero if g is None else g for g in (g_ld, g_ex, g_rr))
        # The terms themselves are not read again.
        first, second = Woodbury(rr, rr, K, y, q, w, rr), Woodbury(rr, rr, K2, y2, q2, w2, rr)
        J, r, h, c, h2 = inputs
        solved = Solved(G, p, rr, first, None if h2 is None else second)
        needs_J, needs_r, *needs = ctx.needs_input_grad[:5]
        dJ = dr = None
        if needs_J or needs_r:
            M, u = gram_cotangents(solved, g_ld, g_ex, g_second)
            dJ, dr = gram_project_backward(J, r, M, u, g_rr, ctx.backend)
        rest = variance_gradients(solved, (h, c, h2), (g_ld, g_ex, g_second), needs)
        return dJ, dr, *rest, None


def squared_norms(J: Tensor, r: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """r^T r ``[B]`` and the squared norms of J's rows ``[B, m]``, in `dtype`."""
    return r.to(dtype).square().sum(-1), J.to(dtype).square().sum(-1)


def _has_zero(h: Tensor) -> bool:
    # On CUDA the answer would synchronise with the host, so both forms are evaluated there.
    return h.device.type != "cpu" or not bool(h.all())


def _q_over_h(q: Tensor, h: Tensor, G: Tensor, K: Tensor, c: Tensor) -> Tensor:
    """D log_det / dh; its limit at h_i = 0 is (G - G K G)_ii / c, which would cancel elsewhere."""
    if not _has_zero(h):
        return q / h
    with full_products(G):
        limit = (G.diagonal(dim1=-2, dim2=-1) - ((G @ K) * G).sum(-1)) / c.unsqueeze(-1)
    return torch.where(h > 0, q / h, limit)


def _w_over_s(w: Tensor, h: Tensor, G: Tensor, p: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """C^-1 v / s; its limit at h_i = 0 is (p - G y)_i / c, which would cancel elsewhere."""
    ratio = w / h.sqrt()
    if not _has_zero(h):
        return ratio
    with full_products(G):
        limit = (p - (G @ y.unsqueeze(-1)).squeeze(-1)) / c.unsqueeze(-1)
    return torch.where(h > 0, ratio, limit)


def _plain_backward(needs, inputs, cotangents):
    with torch.enable_grad():
        # Aliases: one input may depend on another, and that path is not this one's.
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        terms = _plain_terms(*inputs)[:4]
    wanted = [t for t, need in zip(inputs, needs, strict=False) if need]
    grads = iter(differentiate(terms, cotangents, wanted, create_graph=True))
    return *(next(grads) if need else None for need in needs[:5]), None
