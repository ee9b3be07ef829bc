"""Decoders of linear algebra, one for each operation that has a rule, as `CASES`."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal

M, N = 3, 4
LA = torch.linalg
# Added to small matrices: far from singular, and no two values of it are the same.
WELL = torch.eye(N, dtype=torch.float64) * torch.tensor([2.0, 2.7, 3.1, 4.2], dtype=torch.float64)


class Decoder(nn.Module):
    """z through a trained linear map to values of a shape, a function, and a trained tail.

    With `first` the map is linear, so that all samples share its tangents; otherwise it is bent.
    """

    def __init__(self, function, shape, trained=(), first=False):
        super().__init__()
        generator = torch.Generator().manual_seed(sum(map(ord, str(shape))))

        def draw(*size):
            return nn.Parameter(0.4 * torch.randn(size, generator=generator, dtype=torch.float64))

        self.function, self.shape, self.first = function, shape, first
        self.weight, self.gain = draw(M, math.prod(shape)), draw()
        self.trained = nn.ParameterList([draw(*size) for size in trained])

    def forward(self, z):
        h = (z @ self.weight).view(-1, *self.shape)
        if not self.first:
            h = 1.3 * torch.sin(h + 0.2)
        y = self.function(h, *self.trained)
        parts = y if isinstance(y, tuple) else (y,)
        return torch.cat([torch.tanh(self.gain * p.reshape(len(z), -1)) for p in parts], 1)


def well(h):
    """Square matrices far from singular."""
    return h + WELL


def symmetric(h):
    return 0.5 * (h + h.mT) + WELL


def positive(h):
    return h @ h.mT + WELL


def columns(h):
    """A matrix [N, N] and right-hand sides [N, 2] from one value [N, N + 2]."""
    return h[..., :N] + WELL, h[..., N:]


def over_batch(h, matrix):
    """A trained matrix, once for each sample."""
    return matrix.expand(len(h), -1, -1)


SQUARE, BOTH = (N, N), (N, N + 2)
HEADS = (2, N, N)
# Keeps a determinant where the tail still bends.
SMALL = 0.02
NORMS = "fro", "nuc", 2, -2, 1, -1, math.inf
SPREAD = torch.arange(1.0, N + 1, dtype=torch.float64).diag()
# Name: (function of the value and the trained tensors, the value's shape, theirs).
CASES = {
    "solve": (lambda h: LA.solve(*columns(h)), BOTH),
    "solve_vector": (lambda h: LA.solve(well(h[:, :, :N]), h[:, :, N]), (N, N + 1)),
    "solve_right": (lambda h: LA.solve(columns(h)[0], columns(h)[1].mT, left=False), BOTH),
    "solve_ex": (lambda h: LA.solve_ex(*columns(h))[0], BOTH),
    "solve_trained_matrix": (lambda h, a: LA.solve(well(a), h), (N, 3), SQUARE),
    "solve_trained_matrix_right": (lambda h, a: LA.solve(well(a), h, left=False), (3, N), SQUARE),
    "solve_trained_matrix_of_rows": (
        lambda h, a: LA.solve(well(a), h, left=False),
        (N,),
        SQUARE,
    ),
    "solve_trained_matrix_of_columns": (lambda h, a: LA.solve(well(a), h.mT).mT, (N,), SQUARE),
    "solve_trained_matrices": (lambda h, a: LA.solve(well(a), h), (2, N, 3), HEADS),
    "solve_trained_side": (lambda h, b: LA.solve(well(h), b), SQUARE, (N, 3)),
    "solve_trained_side_right": (lambda h, b: LA.solve(well(h), b, left=False), SQUARE, (5, N)),
    "solve_trained_vector": (lambda h, b: LA.solve(well(h), b), SQUARE, (N,)),
    "solve_broadcast": (
        lambda h: LA.solve(well(h[:, :1, :, :N]), h[:, :, :, N:]),
        (2, N, N + 2),
    ),
    "solve_broadcast_sides": (
        lambda h: LA.solve(well(h[..., :N]), h[:, :1, :, N:]),
        (2, N, N + 2),
    ),
    "inv": (lambda h: LA.inv(well(h)), SQUARE),
    "inverse": (lambda h: well(h).inverse(), HEADS),
    "inv_ex": (lambda h: LA.inv_ex(well(h)).inverse, SQUARE),
    "matrix_power": (lambda h: LA.matrix_power(0.3 * well(h), 3), SQUARE),
    "matrix_power_negative": (lambda h: torch.matrix_power(well(h), -2), SQUARE),
    "triangular": (lambda h: LA.solve_triangular(*columns(h), upper=True), BOTH),
    "triangular_lower": (lambda h: LA.solve_triangular(*columns(h), upper=False), BOTH),
    "triangular_unit": (
        lambda h: LA.solve_triangular(*columns(h), upper=False, unitriangular=True),
        BOTH,
    ),
    "triangular_right": (
        lambda h: LA.solve_triangular(h[..., :N] + WELL, h[..., N:].mT, upper=True, left=False),
        BOTH,
    ),
    "triangular_trained": (
        lambda h, a: LA.solve_triangular(well(a), h, upper=False),
        (N, 2),
        SQUARE,
    ),
    "triangular_trained_right": (
        lambda h, a: LA.solve_triangular(well(a), h, upper=False, left=False, unitriangular=True),
        (2, N),
        SQUARE,
    ),
    "triangular_trained_side": (
        lambda h, b: LA.solve_triangular(well(h), b, upper=False),
        SQUARE,
        (N, 2),
    ),
    "triangular_old_returns_both": (
        lambda h, b: torch.triangular_solve(b, well(h[:, 0]), upper=False),
        HEADS,
        (N, 2),
    ),
    "triangular_old": (
        lambda h: torch.triangular_solve(columns(h)[1], columns(h)[0], transpose=True)[0],
        BOTH,
    ),
    "cholesky": (lambda h: LA.cholesky(positive(h)), SQUARE),
    "cholesky_of_heads": (lambda h: LA.cholesky(positive(h)), HEADS),
    "cholesky_upper": (lambda h: LA.cholesky(positive(h), upper=True), SQUARE),
    "cholesky_ex": (lambda h: LA.cholesky_ex(positive(h)).L, SQUARE),
    # Its derivative is that of a symmetric matrix.
    "cholesky_asymmetric": (lambda h: LA.cholesky(SPREAD @ SPREAD + 0.3 * h), SQUARE),
    "cholesky_solve": (
        lambda h: torch.cholesky_solve(h[..., N:], LA.cholesky(positive(h[..., :N]))),
        BOTH,
    ),
    "cholesky_solve_upper": (
        lambda h: torch.cholesky_solve(
            h[..., N:], LA.cholesky(positive(h[..., :N]), upper=True), upper=True
        ),
        BOTH,
    ),
    "cholesky_solve_trained": (
        lambda h, a: torch.cholesky_solve(h, well(a).tril()),
        (N, 2),
        SQUARE,
    ),
    "cholesky_inverse": (lambda h: torch.cholesky_inverse(LA.cholesky(positive(h))), SQUARE),
    "det": (lambda h: SMALL * LA.det(well(h)), SQUARE),
    "det_of_heads": (lambda h: SMALL * torch.det(well(h)), HEADS),
    "det_of_numbers": (lambda h: LA.det(2 + h), (1, 1)),
    "slogdet": (lambda h: LA.slogdet(well(h)).logabsdet, SQUARE),
    "slogdet_with_sign": (lambda h: torch.stack(LA.slogdet(well(h)), -1), HEADS),
    "logdet": (lambda h: torch.logdet(positive(h)), SQUARE),
    "lu": (lambda h: LA.lu(well(h))[1:], SQUARE),
    "lu_with_permutation": (lambda h: sum(LA.lu(well(h.flip(-1)))), SQUARE),
    "lu_factor": (lambda h: LA.lu_factor(well(h.flip(-1))).LU, HEADS),
    "lu_factor_ex": (lambda h: LA.lu_factor_ex(h).LU, SQUARE),
    "lu_tall": (lambda h: LA.lu(h)[1:], (5, 3)),
    "lu_wide": (lambda h: LA.lu(h)[1:], (3, 5)),
    "lu_factor_tall": (lambda h: LA.lu_factor(h).LU, (2, 5, 3)),
    "lu_old": (lambda h: torch.lu(well(h))[0], SQUARE),
    "lu_unpack": (lambda h: torch.lu_unpack(*LA.lu_factor(h))[2], SQUARE),
    "lu_solve": (lambda h: LA.lu_solve(*LA.lu_factor(h[..., :N]), h[..., N:]), BOTH),
    "lu_solve_right": (
        lambda h: LA.lu_solve(*LA.lu_factor(h[..., :N]), h[..., N:].mT, left=False),
        BOTH,
    ),
    "lu_solve_adjoint": (
        lambda h: LA.lu_solve(*LA.lu_factor(h[..., :N]), h[..., N:], adjoint=True),
        BOTH,
    ),
    "lu_solve_trained": (lambda h, a: LA.lu_solve(*LA.lu_factor(well(a)), h), (N, 2), SQUARE),
    "lu_solve_transposed": (
        lambda h: LA.lu_solve(*LA.lu_factor(h[..., :N]), h[..., N:].mT, left=False, adjoint=True),
        BOTH,
    ),
    "qr": (lambda h: LA.qr(well(h)), SQUARE),
    "qr_tall": (lambda h: LA.qr(h), (5, 3)),
    "qr_wide": (lambda h: LA.qr(h), (3, 5)),
    "qr_complete": (lambda h: LA.qr(h, "complete"), (3, 5)),
    "householder": (lambda h: LA.householder_product(h[..., :3], h[..., 0, 3:]), (5, 6)),
    "householder_of_few": (lambda h: torch.orgqr(h[..., :3], h[..., 0, 3:]), (5, 5)),
    "ormqr": (
        lambda h: torch.ormqr(h[..., :3], h[..., 0, 3:6], h[..., 6:]),
        (5, 8),
    ),
    "ormqr_transposed": (
        lambda h: torch.ormqr(h[..., :3], h[..., 0, 3:6], h[..., 6:], transpose=True),
        (5, 8),
    ),
    "ormqr_right": (
        lambda h: torch.ormqr(h[..., :3], h[..., 0, 3:6], h[..., 6:].mT, left=False),
        (5, 8),
    ),
    "eigh": (lambda h: LA.eigh(symmetric(h)), SQUARE),
    "eigh_upper": (lambda h: LA.eigh(symmetric(h), UPLO="U")[1], HEADS),
    "eigvalsh": (lambda h: LA.eigvalsh(symmetric(h)), SQUARE),
    "svd": (lambda h: LA.svd(h + SPREAD), SQUARE),
    "svd_tall": (lambda h: LA.svd(h + SPREAD[:, :3], full_matrices=False), (4, 3)),
    "svd_wide": (lambda h: LA.svd(h + SPREAD[:3], full_matrices=False), (3, 4)),
    "svd_left": (lambda h: LA.svd(h + SPREAD[:, :3], full_matrices=False)[0], (4, 3)),
    "svdvals": (lambda h: LA.svdvals(h + SPREAD), SQUARE),
    "svd_old": (lambda h: torch.svd(h + SPREAD), SQUARE),
    "nuclear_norm": (lambda h: LA.matrix_norm(h + SPREAD, "nuc"), SQUARE),
    "spectral_norm": (lambda h: LA.matrix_norm(h + SPREAD, 2), HEADS),
    "matrix_exp": (lambda h: LA.matrix_exp(h), SQUARE),
    "matrix_exp_of_heads": (lambda h: torch.matrix_exp(h - h.mT), HEADS),
    "pinv": (lambda h: LA.pinv(well(h)), SQUARE),
    "pinv_tall": (lambda h: LA.pinv(h + SPREAD[:, :3]), (4, 3)),
    "pinv_wide": (lambda h: torch.pinverse(h + SPREAD[:3]), (2, 3, 4)),
    "pinv_hermitian": (lambda h: LA.pinv(symmetric(h), hermitian=True), SQUARE),
    "pinv_of_lower_rank": (lambda h: LA.pinv(h[..., :2] @ h[..., 2:].mT, rtol=1e-6), (5, 4)),
    "cross": (lambda h: LA.cross(h[..., :2], h[..., 2:], dim=1), (3, 4)),
    "cross_trained": (lambda h, a: LA.cross(a, h), (4, 3), (1, 4, 3)),
    "cross_broadcast": (lambda h, a: LA.cross(h, a), (4, 3), (1, 1, 3)),
    "vecdot": (lambda h: LA.vecdot(h, h.flip(-1)), (4, 3)),
    "norms": (
        lambda h: torch.stack([LA.matrix_norm(h + SPREAD, p) for p in NORMS], -1),
        SQUARE,
    ),
    "condition_by_inverse": (lambda h: LA.cond(well(h), 1), SQUARE),
    "normal": (
        lambda h: MultivariateNormal(
            h[..., N], covariance_matrix=positive(h[..., :N]), validate_args=False
        ).log_prob(h[..., N + 1]),
        BOTH,
    ),
    "normal_trained": (
        lambda h, a: MultivariateNormal(
            h[..., 0], covariance_matrix=positive(a), validate_args=False
        ).log_prob(h[..., 1]),
        (N, 2),
        SQUARE,
    ),
    "normal_of_low_rank": (
        lambda h: LowRankMultivariateNormal(
            h[..., 0], h[..., 1:3], h[..., 3].exp(), validate_args=False
        ).log_prob(h[..., 4]),
        (N, 5),
    ),
    "cayley": (lambda h: LA.solve(well(h - h.mT), WELL - (h - h.mT)), SQUARE),
    "trained_lu_of_batch": (
        lambda h, a: LA.lu_solve(*LA.lu_factor(over_batch(h, well(a))), h),
        (N, 2),
        SQUARE,
    ),
    "trained_eigh_of_batch": (
        lambda h, a: LA.eigh(over_batch(h, symmetric(a)))[1] @ h,
        (N, 2),
        SQUARE,
    ),
    "trained_det_of_batch": (
        lambda h, a: SMALL * LA.det(over_batch(h, well(a)))[:, None, None] * h,
        (N, 2),
        SQUARE,
    ),
    "multi_dot": (lambda h, a, b: LA.multi_dot([h, a, b]), (4,), (4, 5), (5, 3)),
}
# torch.func's batching gets these wrong: the same by other operations.
ORACLES = {
    "solve_trained_side": lambda h, b: LA.inv(well(h)) @ b,
    "solve_trained_side_right": lambda h, b: b @ LA.inv(well(h)),
    # PyTorch's own overwrites what its derivative needs.
    "condition_by_inverse": lambda h: (
        LA.matrix_norm(well(h), 1) * LA.matrix_norm(LA.inv(well(h)), 1)
    ),
    "trained_lu_of_batch": lambda h, a: LA.inv(well(a)) @ h,
    "lu_solve": lambda h: LA.solve(h[..., :N], h[..., N:]),
    "lu_solve_right": lambda h: LA.solve(h[..., :N], h[..., N:].mT, left=False),
    "lu_solve_adjoint": lambda h: LA.solve(h[..., :N].mT, h[..., N:]),
    "lu_solve_transposed": lambda h: LA.solve(h[..., :N].mT, h[..., N:].mT, left=False),
}


def build(name, first=False):
    """A case's decoder, and one of the same parameters that torch.func differentiates rightly."""
    function, shape, *trained = CASES[name]
    decoder = Decoder(function, shape, trained, first)
    oracle = copy.copy(decoder)
    oracle.function = ORACLES.get(name, function)
    return decoder, oracle
