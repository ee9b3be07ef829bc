"""The sampling-free objective and its cotangents that are m x m or smaller, in one launch.

From G, p and rr (in parts), mean and log h, c, gamma, the KL divergence's weight w_kl, and the
weight a of each sample in the loss. With A, C, w, q as in `woodbury`, y = s w, K = S C^-1 S:

    elbo = log_likelihood - w_kl kl           kl = sum(h + mean^2 - 1 - log h) / 2
    log_likelihood = -n/2 log(2 pi c) - lambda/2 log_det - (rr - gamma explained) / (2c)
    g_ld = -lambda a / 2      g_ex = gamma a / (2c)      g_rr = -a / (2c)
    M = 2 (g_ld K - g_ex y y^T)               u = 2 g_ex y
    d_mean = -a w_kl mean                     d_log_var = g_ld q + g_ex c w^2 - a w_kl (h - 1) / 2
    d_c = a ((rr - gamma explained) / c - n) / (2c) - g_ld sum(q) / c - g_ex |w|^2
    d_gamma = a explained / (2c)              d_kl_weight = -a kl

    precision     lambda = 1
    mixture       lambda = gamma: d_gamma gains -a log_det / 2
    normalized    lambda = 1. With t = 1 - gamma and log_det', K', q' those of the system at t h:
                  log_det - log_det', K - K' and q - q' stand for log_det, K and q, and d_gamma
                  gains g_ld sum(q') / t, whose limit at t = 0 is g_ld tr(A) / c
    expected      nothing is factorised: lambda = 1, log_det = tr(A) / c, K = diag(h) / c,
                  q = diag(A) / c, and gamma, w and y are 0

h dh, and not dh, is what log h needs: nothing is divided by h or s, which may be 0.

Floor: G and p are read and M and u written once, 8 m (m + 1) bytes a sample and 4 m (m + 1) more
for each further part of G; 2 m^3 FLOPs, 4 m^3 for "normalized". What bounds it is neither, but the
m steps of a factorisation, of which each waits for the one before it; "expected" has none. A step
takes 145 instructions with 2 barriers of one warp for m <= 16, 161 with 8 of four warps to 32, and
at most 229 with 14 of eight warps to 64 (counted for sm_89 and sm_90, float32).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._contract import WOODBURY_MAX_M
from ._factorise import bounded, factorise
from ._launch import Configuration, begin, launch
from .woodbury import woodbury_block, woodbury_warps

LIKELIHOODS = ("precision", "mixture", "normalized", "expected")


@triton.jit
def _system(g_ptr, s, b, B, m, splits):
    """A = S G S of sample b, from G's parts, in the dtype of s."""
    i = tl.arange(0, s.shape[0])
    tile = (i < m)[:, None] & (i < m)[None, :]
    at = i[:, None] * m + i[None, :]
    G = tl.zeros([s.shape[0], s.shape[0]], s.dtype)
    for split in range(0, splits):
        G += tl.load(g_ptr + (split * B + b) * m * m + at, mask=tile, other=0.0)
    return s[:, None] * G * s[None, :]


@triton.jit(do_not_specialize=["B", "m", "n", "splits"])
def _elbo_kernel(
    g_ptr,  # [splits, B, m, m]
    p_ptr,  # [splits, B, m]
    rr_ptr,  # [splits, B]
    mean_ptr,  # [B, m]
    log_var_ptr,  # [B, m]
    c_ptr,  # [], as the next two
    gamma_ptr,
    kl_weight_ptr,
    weight_ptr,  # [B]
    elbo_ptr,  # [B], as the next five
    log_likelihood_ptr,
    kl_ptr,
    squared_error_ptr,
    log_det_ptr,
    explained_ptr,
    lost_ptr,  # [B], uint8
    m_ptr,  # M [B, m, m]
    u_ptr,  # [B, m]
    g_rr_ptr,  # [B]
    d_mean_ptr,  # [B, m]
    d_log_var_ptr,  # [B, m]
    d_scalars_ptr,  # [3, B]: of c, gamma and kl_weight
    B,
    m,
    n,
    splits,
    BLOCK_M: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    RESCUE: tl.constexpr,
):
    begin()
    # A rescue computes lost samples again, in float64, and leaves the others alone.
    dtype: tl.constexpr = tl.float64 if RESCUE else tl.float32
    b = tl.program_id(0).to(tl.int64)
    if RESCUE:
        if tl.load(lost_ptr + b) == 0:
            return
    i = tl.arange(0, BLOCK_M)
    inside = i < m
    tile = inside[:, None] & inside[None, :]
    at = i[:, None] * m + i[None, :]
    diagonal = i[:, None] == i[None, :]
    at_b = b * m + i

    c = tl.load(c_ptr).to(dtype)
    gamma = tl.load(gamma_ptr).to(dtype)
    weight = tl.load(weight_ptr + b).to(dtype)
    kl_weight = tl.load(kl_weight_ptr).to(dtype)
    mean = tl.load(mean_ptr + at_b, mask=inside, other=0.0).to(dtype)
    log_var = tl.load(log_var_ptr + at_b, mask=inside, other=0.0).to(dtype)
    h = tl.exp(log_var)
    s = tl.sqrt(h)
    kl = 0.5 * tl.sum(h + mean * mean - 1.0 - log_var, 0)
    tl.store(d_mean_ptr + at_b, -weight * kl_weight * mean, mask=inside)
    if RESCUE:
        # As float32 has summed it: what float64 explains may not pass that.
        rr = tl.load(squared_error_ptr + b).to(dtype)
    else:
        rr = tl.load(rr_ptr + b)
        for split in range(1, splits):
            rr += tl.load(rr_ptr + split * B + b)

    half = 0.5 * weight / c
    g_ld, g_ex = -0.5 * weight, gamma * half
    if LIKELIHOOD == "mixture":
        g_ld = gamma * g_ld
    if LIKELIHOOD == "expected":
        gamma, g_ex = gamma * 0.0, g_ex * 0.0
        norms = tl.zeros([BLOCK_M], dtype)
        for split in range(0, splits):
            part = (split * B + b) * m * m
            norms += tl.load(g_ptr + part + i * (m + 1), mask=inside, other=0.0)
        q = h * norms / c
        log_det = tl.sum(q, 0)
        explained = rr * 0.0
        w = tl.zeros([BLOCK_M], dtype)
        lost = 0
        M = tl.where(diagonal, (2.0 * g_ld * h / c)[:, None], 0.0)
    else:
        p = tl.zeros([BLOCK_M], dtype)
        for split in range(0, splits):
            p += tl.load(p_ptr + (split * B + b) * m + i, mask=inside, other=0.0)
        A = _system(g_ptr, s, b, B, m, splits)
        log_det, explained, C_inv, w, q, lost = factorise(A, s * p, c, m)
        explained = bounded(explained, rr)
        M = 2.0 * g_ld * s[:, None] * C_inv * s[None, :]
        M -= (2.0 * g_ex * s * w)[:, None] * (s * w)[None, :]
    # The cotangent first: the square of w alone may exceed the dtype.
    d_log_var = g_ld * q + (g_ex * c * w) * w - 0.5 * weight * kl_weight * (h - 1.0)
    unexplained = rr - gamma * explained
    d_c = half * (unexplained / c - n) - g_ld / c * tl.sum(q, 0) - tl.sum(g_ex * w * w, 0)
    d_gamma = half * explained
    scaled = log_det
    if LIKELIHOOD == "mixture":
        d_gamma -= 0.5 * weight * log_det
        scaled = gamma * log_det
    # log(2 pi) = 1.837877...
    log_likelihood = -0.5 * (n * (tl.log(c) + 1.8378770664093453) + scaled + unexplained / c)
    tl.store(elbo_ptr + b, log_likelihood - kl_weight * kl)
    tl.store(log_likelihood_ptr + b, log_likelihood)
    tl.store(kl_ptr + b, kl)
    tl.store(squared_error_ptr + b, rr)
    tl.store(log_det_ptr + b, log_det)
    tl.store(explained_ptr + b, explained)
    tl.store(m_ptr + b * m * m + at, M, mask=tile)
    tl.store(u_ptr + at_b, 2.0 * g_ex * s * w, mask=inside)
    tl.store(g_rr_ptr + b, -half)
    tl.store(d_log_var_ptr + at_b, d_log_var, mask=inside)
    tl.store(d_scalars_ptr + b, d_c)
    tl.store(d_scalars_ptr + B + b, d_gamma)
    tl.store(d_scalars_ptr + 2 * B + b, -weight * kl)

    if LIKELIHOOD == "normalized":
        # What the second system takes off. The results so far wait in memory, and G is read again:
        # registers hold no more.
        t = 1.0 - gamma
        A = _system(g_ptr, s, b, B, m, splits)
        trace = tl.sum(tl.sum(tl.where(diagonal, A, 0.0), 0), 0)
        log_det_t, _, C_inv, _, q, lost_t = factorise(t * A, tl.zeros_like(s), c, m)
        lost = tl.maximum(lost, lost_t)
        q_total = tl.sum(q, 0)
        M = 2.0 * t * g_ld * s[:, None] * C_inv * s[None, :]
        # Each was stored by a thread, and is read by all.
        tl.debug_barrier()
        _add(elbo_ptr + b, 0.5 * log_det_t, True)
        _add(log_likelihood_ptr + b, 0.5 * log_det_t, True)
        _add(log_det_ptr + b, -log_det_t, True)
        _add(m_ptr + b * m * m + at, -M, tile)
        _add(d_log_var_ptr + at_b, -g_ld * q, inside)
        _add(d_scalars_ptr + b, g_ld / c * q_total, True)
        # Where t is 0, C is cI.
        _add(d_scalars_ptr + B + b, g_ld * tl.where(t > 0.0, q_total / t, trace / c), True)
    tl.store(lost_ptr + b, lost.to(tl.uint8))


@triton.jit
def _add(pointers, values, mask):
    tl.store(pointers, tl.load(pointers, mask=mask) + values, mask=mask)


class Objective(NamedTuple):
    """What `elbo` gives, each ``[B]`` unless said otherwise.

    Attributes:
        elbo: log_likelihood - kl_weight kl, in nats like the next two.
        log_likelihood: see the module.
        kl: of the posterior from N(0, I).
        squared_error: r^T r.
        log_det: the likelihood's log-determinant term.
        explained: what of `squared_error` the latent variance explains.
        lost: bool, as `Woodbury` has it; of either factorisation.
        M: dG + dG^T, ``[B, m, m]``.
        u: dp, ``[B, m]``.
        g_rr: of r^T r.
        d_mean: ``[B, m]``, of the KL divergence alone.
        d_log_var: ``[B, m]``.
        d_scalars: each sample's part of the gradients of c, gamma and kl_weight, ``[3, B]``.
    """

    elbo: Tensor
    log_likelihood: Tensor
    kl: Tensor
    squared_error: Tensor
    log_det: Tensor
    explained: Tensor
    lost: Tensor
    M: Tensor
    u: Tensor
    g_rr: Tensor
    d_mean: Tensor
    d_log_var: Tensor
    d_scalars: Tensor

    @property
    def terms(self) -> tuple[Tensor, ...]:
        """The first six."""
        return self[:6]


class Latents(NamedTuple):
    """What the objective depends on besides the sums; float32.

    Attributes:
        mean: ``[B, m]``.
        log_var: log h, ``[B, m]``.
        c: noise variance, 0-d.
        gamma: 0-d.
        kl_weight: 0-d.
        weights: of the samples in the loss, ``[B]``.
    """

    mean: Tensor
    log_var: Tensor
    c: Tensor
    gamma: Tensor
    kl_weight: Tensor
    weights: Tensor


def elbo(
    sums: tuple[Tensor, Tensor, Tensor], latents: Latents, n: int, likelihood: str
) -> Objective:
    """Evaluate the objective and its cotangents in one launch.

    Args:
        sums: float32 parts of G, p and rr, ``[S, B, m, m]``, ``[S, B, m]`` and ``[S, B]``, m <= 64.
        latents: what it depends on besides.
        n: elements of one sample's output.
        likelihood: one of `LIKELIHOODS`.

    Raises:
        TypeError: an input that is not float32.
        ValueError: m above 64.
    """
    for name, tensor in {"G": sums[0], "p": sums[1], "rr": sums[2], **latents._asdict()}.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {tensor.dtype}: this kernel takes float32")
    like = latents.mean
    B, m = like.shape
    if m > WOODBURY_MAX_M:
        raise ValueError(f"m={m} does not fit the registers of one program (m <= {WOODBURY_MAX_M})")

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=like.device)

    found = Objective(
        *(empty(B) for _ in range(6)),
        *(empty(B, dtype=torch.bool), empty(B, m, m), empty(B, m), empty(B)),
        *(empty(B, m), empty(B, m), empty(3, B)),
    )
    _launch(tuple(t.contiguous() for t in sums), latents, n, likelihood, found, rescue=False)
    return found


def elbo_again(
    sums: tuple[Tensor, Tensor, Tensor],
    latents: Latents,
    n: int,
    likelihood: str,
    found: Objective,
) -> None:
    """Compute lost samples again in float64, in place; those stay lost that it cannot resolve.

    Args:
        sums: float64 parts of G and p as in `elbo`; those of samples that are not lost are not
            read. (The third, of rr, is not read at all: what is explained is bounded by
            `squared_error` as it is.)
        latents: as in `elbo`.
        n: likewise.
        likelihood: likewise; "expected" loses nothing.
        found: what `elbo` made of them; overwritten.
    """
    _launch((sums[0], sums[1], found.squared_error), latents, n, likelihood, found, rescue=True)


def _launch(
    sums: tuple[Tensor, ...],
    latents: Latents,
    n: int,
    likelihood: str,
    found: Objective,
    rescue: bool,
) -> None:
    splits, B, m = sums[1].shape
    block_m = woodbury_block(m)
    given = (t.contiguous() for t in latents)
    launch(
        *(_elbo_kernel, (B,), *sums, *given),
        *(*found.terms, found.lost.view(torch.uint8), *found[7:], B, m, n, splits),
        BLOCK_M=block_m,
        LIKELIHOOD=likelihood,
        RESCUE=rescue,
        num_warps=woodbury_warps(block_m, rescue),
        maxnreg=_REGISTERS,
    )


# Left alone, the assembler spills a few bytes of some for the sake of fewer registers, which a
# program that waits for itself has no use for.
_REGISTERS = 255


def configurations() -> Iterator[Configuration]:
    """Every compilation of this kernel: the buckets of m, the likelihoods, and their rescues."""
    names = (*("g", "p", "rr", *Latents._fields[:-1], "weight"), *Objective._fields)
    for block_m, likelihood, rescue in product((16, 32, 64), LIKELIHOODS, (False, True)):
        if rescue and likelihood == "expected":
            continue
        types = {f"{name.lower()}_ptr": "*fp32" for name in names} | {"lost_ptr": "*u8"}
        if rescue:
            types |= {"g_ptr": "*fp64", "p_ptr": "*fp64"}
        yield Configuration(
            _elbo_kernel,
            f"m={block_m} {likelihood}" + (" rescue" if rescue else ""),
            types,
            {"BLOCK_M": block_m, "LIKELIHOOD": likelihood, "RESCUE": rescue},
            num_warps=woodbury_warps(block_m, rescue),
            maxnreg=_REGISTERS,
        )
