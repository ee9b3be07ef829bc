"""The m x m factorisation, in plain torch and by its Triton kernel.

The plain form takes any m, float dtype and device, and never waits for a CUDA device.

The pivot rule. In exact arithmetic every pivot of C = cI + A is at least c. A computed pivot d_k
below floor_k = max(c, 4 eps C_kk) is rounding noise: it counts in the log-determinant at that floor
and eliminates nothing (its multipliers and its forward-substituted entry are 0). So no finite Gram
gives a NaN or a blow-up; a floor that still eliminates would divide rounding noise by c.

A sample is lost when a pivot fell below its floor, or kept fewer than half of its digits
(d_k < sqrt(eps) C_kk): subtracting from C_kk leaves d_k an absolute error of a few eps C_kk, so
that noise just above the floor would pass for a pivot. It is lost as well when d_k / c is not
finite: the Gram has left the range of its dtype, which a wider one may hold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae.kernels._contract import Woodbury as Woodbury
from fastsfvae.ops import _library
from fastsfvae.ops.gram_project import full_products

_BLOCK = 32


def woodbury_native(
    gram: Tensor, projection: Tensor, rr: Tensor, latent_var: Tensor, noise_var: Tensor
) -> Woodbury:
    """Factorise C = cI + S G S for each sample and evaluate everything that follows from it.

    Args:
        gram: G, ``[B, m, m]``.
        projection: p, ``[B, m]``.
        rr: r^T r, ``[B]``.
        latent_var: h, ``[B, m]``.
        noise_var: c, ``[B]``.
    """
    with full_products(gram):
        return _solve(gram, projection, rr, latent_var, noise_var)


def _solve(
    gram: Tensor, projection: Tensor, rr: Tensor, latent_var: Tensor, noise_var: Tensor
) -> Woodbury:
    s = latent_var.sqrt()
    v = s * projection
    A = s.unsqueeze(-1) * gram * s.unsqueeze(-2)
    C = A.clone()
    C.diagonal(dim1=-2, dim2=-1).add_(noise_var.unsqueeze(-1))
    eps = torch.finfo(C.dtype).eps
    C_diag = C.diagonal(dim1=-2, dim2=-1)
    floor = torch.maximum(noise_var.unsqueeze(-1), 4 * eps * C_diag)
    L, d, floored = _factorise(C, floor)

    L_inv = _inverse(L)
    v_hat = (L_inv @ v.unsqueeze(-1)).squeeze(-1).masked_fill(floored, 0)
    D_inv_v = v_hat / d
    C_inv = L_inv.mT @ (L_inv / d.unsqueeze(-1))
    w = (L_inv.mT @ D_inv_v.unsqueeze(-1)).squeeze(-1)

    C_inv_diag = C_inv.diagonal(dim1=-2, dim2=-1)
    c = noise_var.unsqueeze(-1)
    # Each form of q is exact where the other cancels: 1 - c C^-1_ii is 1 - 1 for a small A_ii.
    q = torch.where(A.diagonal(dim1=-2, dim2=-1) < c, (A * C_inv).sum(-1), 1 - c * C_inv_diag)
    ratio = d / c
    resolved = (d >= eps**0.5 * C_diag) & ratio.isfinite() & ~floored
    return Woodbury(
        log_det=ratio.log().sum(-1),
        explained=torch.minimum((v_hat * D_inv_v).sum(-1).clamp(min=0), rr),
        K=s.unsqueeze(-1) * C_inv * s.unsqueeze(-2),
        y=s * w,
        q=q,
        w=w,
        lost=~resolved.all(-1),
    )


class LogDet(NamedTuple):
    """Of C = G + cI.

    Attributes:
        value: log det C, ``[B]``, in nats; -inf where C is singular.
        root: R with R^T R = C^-1, ``[B, m, m]``; zeros where C is singular.
        lost: bool ``[B]``, as `Woodbury.lost`; also where C is singular.
    """

    value: Tensor
    root: Tensor
    lost: Tensor


def log_det_native(
    gram: Tensor,
    c: Tensor | None,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> LogDet:
    """Factorise C = G + cI for each sample, where c may be missing.

    By the module's rule. Without a c nothing bounds a pivot from below: a sample with one below
    4 eps C_kk is singular. Where G is the rest of something larger, which has another way to it, a
    pivot that has kept fewer than two thirds of its digits is lost already.

    Args:
        gram: G, ``[B, m, m]``.
        c: > 0, 0-d; None for C = G.
        scale: ``[B, m]``, what G_kk is a rest of, with an error of a few eps times that; None for
            G_kk itself.
        dtype: of the result; None for that of G.
    """
    dtype = dtype or gram.dtype
    with full_products(gram):
        C = gram.clone()
        C_diag = C.diagonal(dim1=-2, dim2=-1)
        kept = 1 / 2 if scale is None else 1 / 3
        scale = C_diag if scale is None else scale
        if c is not None:
            scale = scale + c
            C_diag.add_(c)
        info = torch.finfo(C.dtype)
        # A row of zeros is singular, too.
        floor = (4 * info.eps * scale).clamp(min=info.tiny)
        L, d, floored = _factorise(C, floor if c is None else torch.maximum(c, floor))
        value, root = d.log().sum(-1), _inverse(L) * d.rsqrt().unsqueeze(-1)
    resolved = (d >= info.eps**kept * scale) & d.isfinite() & ~floored
    if c is None:
        singular = floored.any(-1)
        value = value.masked_fill(singular, -torch.inf)
        root = root.masked_fill(singular[:, None, None], 0)
    return LogDet(value.to(dtype), root.to(dtype), ~resolved.all(-1))


def _inverse(L: Tensor) -> Tensor:
    """L^-1, ``[B, m, m]``, of a unit-lower L."""
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    return torch.linalg.solve_triangular(L, eye, upper=False, unitriangular=True)


def _factorise(C: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C = L diag(d) L^T with the pivot rule: unit-lower L [B, m, m], d [B, m], floored [B, m].

    On the CPU, LAPACK factorises every sample and the rule is applied to the few that fail it. On
    CUDA that choice would be a host synchronisation, so the blocked form runs for all.
    """
    if C.device.type != "cpu":
        return _factorise_blocked(C, floor)
    chol, info = torch.linalg.cholesky_ex(C)
    root = chol.diagonal(dim1=-2, dim2=-1)
    d = root.square()
    good = (info == 0) & (d >= floor).all(-1)
    L = chol / root.unsqueeze(-2)
    floored = torch.zeros_like(d, dtype=torch.bool)
    if not bool(good.all()):
        bad = (~good).nonzero().squeeze(-1)
        L[bad], d[bad], floored[bad] = _factorise_blocked(C[bad], floor[bad])
    return L, d, floored


def _factorise_blocked(C: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Right-looking and blocked: rank-1 updates inside a diagonal block, products outside it."""
    m = C.shape[-1]
    C = C.clone()
    L = torch.eye(m, dtype=C.dtype, device=C.device).repeat(C.shape[0], 1, 1)
    d = torch.empty_like(floor)
    floored = torch.empty_like(floor, dtype=torch.bool)
    for start in range(0, m, _BLOCK):
        stop = min(start + _BLOCK, m)
        for k in range(start, stop):
            pivot = C[:, k, k]
            floored[:, k] = pivot < floor[:, k]
            d[:, k] = torch.where(floored[:, k], floor[:, k], pivot)
            keep = ~floored[:, k, None]
            # The whole column: rows of this block are needed now, rows below it are the panel.
            column = torch.where(keep, C[:, k + 1 :, k] / d[:, k, None], 0)
            L[:, k + 1 :, k] = column
            inside = stop - (k + 1)
            # Later columns of this block, in all rows below k.
            C[:, k + 1 :, k + 1 : stop] -= column.unsqueeze(-1) * (
                column[:, :inside] * d[:, k, None]
            ).unsqueeze(-2)
        panel = L[:, stop:, start:stop]
        C[:, stop:, stop:] -= (panel * d[:, None, start:stop]) @ panel.mT
    return L, d, floored


def gram_woodbury_triton(
    jacobian: Tensor, residual: Tensor, latent_var: Tensor, noise_var: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Woodbury]:
    """``(G, p, rr)`` and the factorisation of their system; no graph of its own.

    Where J is float32, lost samples are rescued (`fastsfvae.kernels.woodbury_float64`).

    Args:
        jacobian: J, ``[B, m, n]`` with m <= 64; float32, bfloat16 or float16.
        residual: r, ``[B, n]``, one of the same dtypes.
        latent_var: as in `woodbury_triton`.
        noise_var: as in `woodbury_triton`.

    Raises:
        RuntimeError, TypeError, ValueError: as `woodbury_triton`.
    """
    _library.require_triton(jacobian)
    gram, projection, rr, *solved = _library.gram_woodbury(
        jacobian, residual, latent_var, noise_var
    )
    return (gram, projection, rr), Woodbury(*solved)


def woodbury_triton(
    gram: Tensor,
    projection: Tensor,
    rr: Tensor,
    latent_var: Tensor,
    noise_var: Tensor,
    jacobian: Tensor | None = None,
    residual: Tensor | None = None,
) -> Woodbury:
    """Factorise C = cI + S G S in one launch; no graph of its own.

    Args:
        gram: G, float32 ``[B, m, m]`` with m <= 64.
        projection: p, float32 ``[B, m]``.
        rr: r^T r, float32 ``[B]``.
        latent_var: h >= 0, float32 ``[B, m]``.
        noise_var: c > 0, float32 ``[B]``.
        jacobian: J, float32 ``[B, m, n]``, given with r to rescue lost samples in two more.
        residual: r, ``[B, n]``.

    Raises:
        RuntimeError: a device that Triton cannot reach.
        TypeError: an input that is not float32.
        ValueError: float64, or m above 64.
    """
    _library.require_triton(gram)
    return Woodbury(
        *_library.woodbury(gram, projection, rr, latent_var, noise_var, jacobian, residual)
    )
