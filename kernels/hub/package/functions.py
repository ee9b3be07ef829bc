"""The public functions: checks, then the operators and adjoints of the library."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._fastsfvae import _checks, reference
from ._fastsfvae.ops import gram_project as _gram_project
from ._fastsfvae.ops import low_rank as _low_rank
from ._fastsfvae.ops import woodbury as _woodbury

BACKENDS = ("triton", "torch", "reference")


class GramProject(NamedTuple):
    """What `gram_project` returns, in float32 or wider.

    Attributes:
        gram: G = J J^T, ``[B, m, m]``.
        projection: p = J r, ``[B, m]``.
        squared_error: rr = r^T r, ``[B]``.
    """

    gram: Tensor
    projection: Tensor
    squared_error: Tensor


class WoodburyTerms(NamedTuple):
    """What `woodbury` returns, each ``[B]``.

    Attributes:
        log_det: log det(I + A/c) in nats, A = S G S.
        explained: p^T S (cI + A)^-1 S p, between 0 and the squared error.
        lost: bool, True where float32 cannot tell a pivot of cI + A from rounding noise: the values
            then rest on the smallest pivot that it can tell.
    """

    log_det: Tensor
    explained: Tensor
    lost: Tensor


class LowRankTerms(NamedTuple):
    """What `low_rank_terms` returns, each ``[B]``; as `WoodburyTerms` and `GramProject` say.

    `lost` is False where float64 has resolved what float32 could not.
    """

    log_det: Tensor
    explained: Tensor
    squared_error: Tensor
    lost: Tensor


def gram_project(jacobian: Tensor, residual: Tensor, *, backend: str = "triton") -> GramProject:
    """G = J J^T, p = J r and rr = r^T r of each sample; differentiable.

    The gradients are dJ = (dG + dG^T) J + dp r^T and dr = J^T dp + 2 d_rr r, in one launch that
    reads J once, in the dtypes of J and r.

    Args:
        jacobian: J, ``[B, m, n]``: row i is the derivative by latent i. Any strides; copied only
            where n's is not 1. float32, bfloat16 or float16; the sums are float32.
        residual: r, ``[B, n]``, one of the same dtypes.
        backend: "triton", with first derivatives, on CUDA tensors; "torch" or "reference", the same
            in plain PyTorch, any device, floating dtype and order of derivative.

    Raises:
        RuntimeError: "triton" on a device that it cannot reach; a second derivative through it.
        TypeError: no floating-point tensors, or a dtype that the kernel does not take.
        ValueError: shapes or devices that do not fit, an unknown backend, float64 for "triton".
    """
    _checks.choice("backend", backend, BACKENDS)
    _check_shapes(jacobian=(jacobian, "Bmn"), residual=(residual, "Bn"))
    return GramProject(*_gram_project.gram_project(jacobian, residual, backend))


def woodbury(
    gram: Tensor,
    projection: Tensor,
    squared_error: Tensor,
    latent_var: Tensor,
    noise_var: float | Tensor,
    *,
    backend: str = "triton",
) -> WoodburyTerms:
    """Of A = S G S, S = diag(sqrt h): log det(I + A/c) and p^T S (cI + A)^-1 S p; differentiable.

    One launch factorises every sample's m x m system; the gradients need no solve of their own.
    Tensors' values are not read on the host, so negative variances are not refused: log_det is NaN
    then, or the sample is marked lost.

    Args:
        gram: G, ``[B, m, m]``, symmetric, float32 with m <= 64 for "triton".
        projection: p, ``[B, m]``.
        squared_error: rr, ``[B]``: bounds `explained` from above; no gradient flows into it.
        latent_var: h >= 0, ``[B, m]``; converted to G's dtype, as c is.
        noise_var: c > 0: a number, a 0-d tensor, or ``[B]``.
        backend: "triton", on CUDA tensors, or "torch", both with first derivatives; "reference",
            dense algebra with derivatives of any order, which loses no sample and bounds nothing.

    Raises:
        RuntimeError: "triton" on a device that it cannot reach; a second derivative.
        TypeError: no floating-point tensors, or G, p and rr not in float32 or float64 alike.
        ValueError: m above 64 for "triton"; shapes or devices that do not fit, an unknown backend,
            a number c that is not positive, float64 for "triton".
    """
    _checks.choice("backend", backend, BACKENDS)
    _check_shapes(
        gram=(gram, "Bmm"),
        projection=(projection, "Bm"),
        squared_error=(squared_error, "B"),
        latent_var=(latent_var, "Bm"),
    )
    dtypes = [t.dtype for t in (gram, projection, squared_error)]
    if len(set(dtypes)) > 1 or gram.dtype.itemsize < 4:
        raise TypeError(
            "gram {}, projection {}, squared_error {}: give all three in float32, as gram_project "
            "returns them, or in float64".format(*dtypes)
        )
    c = _each_noise_var(noise_var, gram)
    _check_shapes(gram=(gram, "Bmm"), noise_var=(c, "B"))
    h, c = latent_var.to(gram.dtype), c.to(gram.dtype)
    if backend == "reference":
        log_det, explained = reference.woodbury(gram, projection, h, c)
        return WoodburyTerms(log_det, explained, torch.zeros_like(c, dtype=torch.bool))
    return WoodburyTerms(*_Woodbury.apply(gram, projection, squared_error, h, c, backend)[:3])


def low_rank_terms(
    jacobian: Tensor,
    residual: Tensor,
    latent_var: Tensor,
    noise_var: float | Tensor,
    *,
    backend: str = "triton",
) -> LowRankTerms:
    """`gram_project` and `woodbury` in one, differentiable in all four arguments.

    Two launches forward and one backward; two more, which leave at once where nothing was lost,
    form lost samples' Gram again in float64 if J is float32. The log-density of r in nats is

        -0.5 * (n * log(2 pi c) + log_det + (squared_error - explained) / c)

    Args:
        jacobian: as in `gram_project`. Above m = 64 "triton" forms G, and PyTorch factorises it.
        residual: likewise.
        latent_var: as in `woodbury`; converted to float32, or J's dtype where that is wider.
        noise_var: likewise.
        backend: as in `gram_project`; "torch" and "reference" have second derivatives.

    Raises:
        RuntimeError, TypeError, ValueError: as `gram_project`; a number c that is not positive.
    """
    _checks.choice("backend", backend, BACKENDS)
    _check_shapes(
        jacobian=(jacobian, "Bmn"), residual=(residual, "Bn"), latent_var=(latent_var, "Bm")
    )
    c = _each_noise_var(noise_var, jacobian)
    _check_shapes(jacobian=(jacobian, "Bmn"), noise_var=(c, "B"))
    terms = _low_rank.low_rank_terms(jacobian, residual, latent_var, c, backend=backend)
    return LowRankTerms(terms.log_det, terms.explained, terms.squared_error, terms.lost)


def _check_shapes(**named: tuple[Tensor, str]) -> None:
    """Raise unless floating tensors have the named axes, none of them empty, on one device."""
    for name, (tensor, _) in named.items():
        _checks.floating(name, tensor)
    sizes: dict[str, set[int]] = {}
    fit = True
    for tensor, axes in named.values():
        fit &= tensor.dim() == len(axes)
        for axis, size in zip(axes, tensor.shape, strict=False):
            sizes.setdefault(axis, set()).add(size)
    if not fit or any(len(found) > 1 or 0 in found for found in sizes.values()):
        given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, (tensor, _) in named.items())
        wanted = ", ".join(f"{name} [{', '.join(axes)}]" for name, (_, axes) in named.items())
        raise ValueError(f"{given} do not fit together: give {wanted}, none of them empty")
    first, *others = ((name, tensor) for name, (tensor, _) in named.items())
    _checks.same_device(first, *others)


def _each_noise_var(noise_var: float | Tensor, like: Tensor) -> Tensor:
    """C of each sample of a tensor ``[B, ...]``, ``[B]`` if it was a number or 0-d."""
    if isinstance(noise_var, Tensor) and noise_var.dim() > 0:
        return noise_var
    _checks.noise_var(noise_var)
    if not isinstance(noise_var, Tensor):
        dtype = torch.promote_types(like.dtype, torch.float32)
        noise_var = torch.full((), noise_var, dtype=dtype, device=like.device)
    return noise_var.expand(len(like))


class _Woodbury(torch.autograd.Function):
    """The adjoint of `low_rank_terms` up to J; outputs after the third feed the backward."""

    vmap = staticmethod(_low_rank.refuse_vmap)

    @staticmethod
    def forward(gram, projection, squared_error, latent_var, noise_var, backend):
        solve = {"triton": _woodbury.woodbury_triton, "torch": _woodbury.woodbury_native}[backend]
        found = solve(gram, projection, squared_error, latent_var, noise_var)
        return found.log_det, found.explained, found.lost, found.K, found.y, found.q, found.w

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx, g_ld, g_ex, *_):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f'woodbury has first derivatives only with backend="{ctx.backend}": use '
                'backend="reference" for the second'
            )
        gram, projection, rr, h, c, log_det, explained, lost, K, y, q, w = ctx.saved_tensors
        first = _woodbury.Woodbury(log_det, explained, K, y, q, w, lost)
        solved = _low_rank.Solved(gram, projection, rr, first, None)
        # M = dG + dG^T of a symmetric dG.
        M, u = _low_rank.gram_cotangents(solved, g_ld, g_ex, None)
        dh, dc, _ = _low_rank.variance_gradients(solved, (h, c, None), (g_ld, g_ex, None))
        return M / 2, u, None, dh, dc, None
