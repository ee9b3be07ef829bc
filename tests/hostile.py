"""Hostile inputs of the primitive, 150-digit results, and first-order bounds of the errors."""

from typing import NamedTuple

import mpmath
import torch
from hypothesis import strategies as st
from torch import Tensor

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
GAMMAS = (0.0, 1e-6, 0.5, 0.99, 1.0)


class Inputs(NamedTuple):
    """J ``[m, n]``, r ``[n]``, h ``[m]`` and a 0-d c, in float32 or float64."""

    J: Tensor
    r: Tensor
    h: Tensor
    c: Tensor


class Cotangents(NamedTuple):
    """Of log_det, explained and rr."""

    log_det: float
    explained: float
    rr: float


class Exact(NamedTuple):
    """Float64 results of `exact_terms`; the last five are gradients of their weighted sum.

    `lost_share` is the largest C_kk / d_k over the pivots d_k of C.
    """

    log_det: Tensor
    explained: Tensor
    in_J: Tensor
    in_r: Tensor
    in_h: Tensor
    in_c: Tensor
    C_inv: Tensor
    lost_share: float


class Bounds(NamedTuple):
    """Allowed errors of the first six of `Exact`; that of h's gradient is the one in log h."""

    log_det: Tensor
    explained: Tensor
    in_J: Tensor
    in_r: Tensor
    in_log_h: Tensor
    in_c: Tensor


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def generator_of(draw) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 10**6)))


def draw_jacobian(draw, m: int, n: int) -> Tensor:
    """Rows of any scale, some zero or a multiple of the one before."""
    generator = generator_of(draw)
    J = torch.randn(m, n, generator=generator, dtype=torch.float64) * 10 ** draw(st.floats(-8, 8))
    for row in range(1, m):
        kind = draw(st.sampled_from(["free"] * 4 + ["repeated", "nearly repeated", "zero"]))
        if kind == "zero":
            J[row] = 0
        elif kind != "free":
            J[row] = J[row - 1] * (1 + 1e-6 * (kind != "repeated"))
    return J


def draw_residual(draw, n: int) -> Tensor:
    r = torch.randn(n, generator=generator_of(draw), dtype=torch.float64)
    return r * 10 ** draw(st.floats(-4, 4))


def draw_variances(draw, m: int) -> Tensor:
    exponents = draw(st.lists(st.floats(-20, 8), min_size=m, max_size=m))
    return torch.tensor([10**e for e in exponents], dtype=torch.float64)


def draw_noise(draw) -> Tensor:
    return torch.tensor(10 ** draw(st.floats(-8, 4)), dtype=torch.float64)


@st.composite
def primitive_inputs(draw) -> Inputs:
    """m > n and n = 1 among them."""
    m, n = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    dtype = draw(st.sampled_from(list(EPS)))
    tensors = (
        *(draw_jacobian(draw, m, n), draw_residual(draw, n)),
        *(draw_variances(draw, m), draw_noise(draw)),
    )
    return Inputs(*(t.to(dtype) for t in tensors))


def exact_terms(inputs: Inputs, g: Cotangents) -> Exact:
    """From Sigma = J^T H J + cI, n x n: no formula of the library's."""
    with mpmath.workdps(150):
        J = mpmath.matrix(inputs.J.double().tolist())
        r = mpmath.matrix(inputs.r.double().tolist())
        h, c = mpmath.diag(inputs.h.double().tolist()), mpmath.mpf(float(inputs.c))
        m, n = J.rows, J.cols
        sigma = J.T * h * J + c * mpmath.eye(n)
        P = mpmath.inverse(sigma)
        a = P * r
        Ja = J * a
        log_det = mpmath.log(mpmath.det(sigma / c))
        explained = (r.T * r)[0] - c * (r.T * a)[0]
        in_J = 2 * g.log_det * h * J * P + 2 * g.explained * c * h * Ja * a.T
        in_r = 2 * (mpmath.mpf(g.explained) + g.rr) * r - 2 * g.explained * c * a
        JPJ = J * P * J.T
        in_h = [g.log_det * JPJ[i, i] + g.explained * c * Ja[i] ** 2 for i in range(m)]
        in_c = g.log_det * (sum(P[i, i] for i in range(n)) - n / c)
        in_c += g.explained * (c * (a.T * a)[0] - (r.T * a)[0])
        s = h.apply(mpmath.sqrt)
        C = s * J * J.T * s + c * mpmath.eye(m)
        L = mpmath.cholesky(C)
        lost_share = max(C[i, i] / L[i, i] ** 2 for i in range(m))
        # The Woodbury identity, so that no second matrix has to be inverted.
        C_inv = (mpmath.eye(m) - s * JPJ * s) / c

        def tensor(values, *shape):
            return torch.tensor([float(v) for v in values], dtype=torch.float64).view(shape)

        return Exact(
            *(tensor([log_det]), tensor([explained]), tensor(in_J, m, n), tensor(in_r, n)),
            *(tensor(in_h, m), tensor([in_c]), tensor(C_inv, m, m), float(lost_share)),
        )


def gram_rounding(inputs: Inputs, lost_share: float) -> float | None:
    """The eps of the dtype that the Gram ends up in, None for a sample beyond it.

    With fewer than half of the digits left, float64 takes over from float32 and gives up by itself.
    """
    rounding = EPS[inputs.J.dtype]
    if lost_share <= 4 / rounding**0.5:
        return rounding
    double = EPS[torch.float64]
    if rounding == double or lost_share > 0.25 / double**0.5:
        return None
    return double


def bounds(inputs: Inputs, C_inv: Tensor, g: Cotangents, of_gram: float) -> Bounds:
    """First-order bounds of the errors.

    C is formed and factorised with errors below E = unit (a a^T + diag C), a_i = s_i |J_i|, of n
    products and m eliminations in the Gram's precision; results are sums of at most n + m products
    that are rounded to the inputs' dtype.
    """
    J, r, h, c = (t.double() for t in inputs)
    m, n = J.shape
    unit, rounding = (n + m + 1) * of_gram, EPS[inputs.J.dtype]
    g_ld, g_ex, g_rr = map(abs, g)
    s, P = h.sqrt(), C_inv.abs()
    a, size = s * J.norm(dim=1), r.norm()
    E = unit * (torch.outer(a, a) + torch.diag(c + a.square()))
    w = (C_inv @ (s * (J @ r))).abs()
    d_v = unit * a * size
    d_P = P @ E @ P + rounding * P
    d_w = P @ d_v + P @ E @ w + rounding * w
    d_log_det = (P * E).sum() + rounding * (1 + (1 + a.square() / c).log().sum())
    d_explained = 2 * w @ d_v + w @ E @ w + rounding * size.square()
    count = n + m + 4
    K, d_K = s[:, None] * P * s, s[:, None] * d_P * s
    y, d_y = s * w, s * d_w
    J, r = J.abs(), r.abs()
    passed = y @ J
    d_J = g_ld * (d_K + count * rounding * K) @ J
    d_J += g_ex * (
        torch.outer(d_y, r + passed)
        + torch.outer(y, d_y @ J)
        + count * rounding * torch.outer(y, r + passed)
    )
    d_r = g_ex * ((d_y + count * rounding * y) @ J) + count * rounding * g_rr * r
    A = torch.outer(a, a)
    by_sum = (P * A + d_P * A / unit).sum(1) * unit + count * rounding * (P * A).sum(1)
    by_complement = c * d_P.diagonal() + 2 * rounding
    d_q = torch.where(a.square() < c, by_sum, torch.maximum(by_sum, by_complement))
    d_ww = 2 * w * d_w + count * rounding * w.square()
    d_log_h = g_ld * d_q + g_ex * c * d_ww
    d_c = g_ld * d_q.sum() / c + g_ex * d_ww.sum()
    return Bounds(d_log_det[None], d_explained[None], 2 * d_J, 2 * d_r, d_log_h, d_c[None])
