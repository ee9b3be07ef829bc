"""Gram matrix and projection of a tangent-major Jacobian: G = J J^T, p = J r, rr = r^T r.

J is [B, m, n] and often a transposed view of [m, B, n] storage: nothing here copies it, except
to float32 from a half dtype on the torch backend. Sums and results are at least float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastsfvae import reference
from fastsfvae._ranges import ranged
from fastsfvae.ops import _library


def gram_project(J: Tensor, r: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable ``(G [B, m, m], p [B, m], rr [B])``.

    Args:
        J: ``[B, m, n]``, tangent-major, any strides.
        r: ``[B, n]``.
        backend: "torch" or "reference" (any order of derivative), or "triton" (first order).

    Raises:
        RuntimeError: "triton" on a device it cannot reach; a second derivative through "triton".
        ValueError: "triton" with float64.
    """
    if backend == "triton":
        _library.require_triton(J)
        return _GramProject.apply(J, r)
    if backend == "reference":
        return reference.gram_project(J, r)
    return _forward(J, r)


@ranged("gram")
def gram_project_forward(J: Tensor, r: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """`gram_project` for use inside an autograd.Function: the same values, no graph of its own."""
    if backend == "triton":
        _library.require_triton(J)
        return _library.gram_project(J, r)
    return _forward(J, r)


@ranged("gram backward")
def gram_project_backward(
    J: Tensor,
    r: Tensor,
    M: Tensor,
    u: Tensor,
    g_rr: Tensor,
    backend: str,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pullback: dJ = M J + u r^T and dr = J^T u + 2 g_rr r, in the dtypes of J and r.

    Args:
        J: ``[B, m, n]`` as in the forward.
        r: ``[B, n]`` as in the forward.
        M: dG + dG^T, ``[B, m, m]``.
        u: dp, ``[B, m]``.
        g_rr: d rr, ``[B]``.
        backend: "torch" or "triton".
        out: where dJ is written, with unit stride in n and, for "triton", in J's dtype; None for
            new memory in J's order of strides.

    Returns:
        ``(dJ [B, m, n], dr [B, n])``.
    """
    if backend == "triton":
        _library.require_triton(J)
        if out is None:
            return _library.gram_project_bwd(J, r, M, u, g_rr)
        # Only a sweep has memory at hand, and no compiler sees it: an operator's results are new.
        from fastsfvae.kernels.gram_project import gram_project_bwd

        return gram_project_bwd(J, r, M, u, g_rr, out=out)
    dtype = _compute_dtype(J, r)
    dJ = out
    if dJ is None or dJ.dtype != dtype:
        dJ = torch.empty_like(J, dtype=dtype)
    with full_products(J):
        J32, r32, M, u, g_rr = (t.to(dtype) for t in (J, r, M, u, g_rr))
        # Written in place: J's order of strides is kept, and no product of J's size is allocated.
        torch.mul(u.unsqueeze(-1), r32.unsqueeze(-2), out=dJ)
        dJ.baddbmm_(M, J32)
        dr = torch.bmm(u.unsqueeze(-2), J32).squeeze(-2)
        dr.addcmul_(g_rr.unsqueeze(-1), r32, value=2)
    if out is not None and out is not dJ:
        dJ = out.copy_(dJ)
    return dJ.to(J.dtype), dr.to(r.dtype)


def _compute_dtype(J: Tensor, r: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(J.dtype, r.dtype), torch.float32)


@contextlib.contextmanager
def full_products(J: Tensor) -> Iterator[None]:
    """Neither autocast nor TF32: a rounded G cannot hold the ratio of its eigenvalues to c.

    Nor could what is computed from it. A compiler can follow no change of TF32's setting, nor read
    it: what it compiles of plain torch keeps the caller's.
    """
    matmul = torch.backends.cuda.matmul
    with torch.autocast(J.device.type, enabled=False):
        compiling = torch.compiler.is_compiling()
        if compiling or not J.is_cuda or matmul.fp32_precision in ("none", "ieee"):
            yield
            return
        chosen = matmul.fp32_precision
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = chosen


def _forward(J: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _compute_dtype(J, r)
    with full_products(J):
        J, r = J.to(dtype), r.to(dtype)
        G = torch.bmm(J, J.mT)
        # The row in front: behind J, a CPU's library takes each column of one for a matrix.
        p = torch.bmm(r.unsqueeze(-2), J.mT).squeeze(-2)
        return G, p, r.square().sum(-1)


class _GramProject(torch.autograd.Function):
    @staticmethod
    def forward(J, r):
        return _library.gram_project(J, r)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g_G, g_p, g_rr):
        _library.refuse_second_order()
        J, r = ctx.saved_tensors
        return _library.gram_project_bwd(J, r, g_G + g_G.mT, g_p, g_rr)
