"""Linear algebra: J and its gradients, of autograd and of adjoints, against reverse mode."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
from torch import nn

from fastsfvae.jacobian.api import decode_with_jacobian
from fastsfvae.jacobian.run.cache import Linearizer
from tests.jacobian.exactness import TOLERANCE, loss_and_gradients
from tests.jacobian.test_rules import compare

M, N = 3, 4
BACKENDS = "torch", "reference"
# Of PyTorch's: two old names, and what torch.func has no batching for.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated in favor of"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
LA = torch.linalg
# Rows that do not add up to anything special.
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


SQUARE, BOTH = (N, N), (N, N + 2)
HEADS = (2, N, N)
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
    "det": (lambda h: LA.det(well(h)), SQUARE),
    "det_of_heads": (lambda h: torch.det(well(h)), HEADS),
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
    "multi_dot": (lambda h, a, b: LA.multi_dot([h, a, b]), (4,), (4, 5), (5, 3)),
}
# torch.func's batching gets these wrong: the same by other operations.
ORACLES = {
    "solve_trained_side": lambda h, b: LA.inv(well(h)) @ b,
    "solve_trained_side_right": lambda h, b: b @ LA.inv(well(h)),
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


def latents(samples=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, M, generator=generator, dtype=torch.float64)


def assert_swept(decoder, oracle, z):
    """The loss and its gradients as the oracle's, at once and in chunks, by the adjoints."""
    want, exact = loss_and_gradients(oracle, z, "reference")
    scale = max(1.0, *(float(g.abs().max()) for g in exact))
    for chunk_size in (None, 2):
        got, gradients = loss_and_gradients(decoder, z, "torch", chunk_size=chunk_size)
        assert abs(got - want) <= TOLERANCE * max(1.0, abs(float(want)))
        for ours, theirs in zip(gradients, exact, strict=True):
            assert float((ours - theirs).abs().max()) <= TOLERANCE * scale
    assert Linearizer(decoder, z).plan(len(z)).obstacles == []


@pytest.mark.parametrize("first", [False, True], ids=["bent", "shared"])
@pytest.mark.parametrize("name", CASES)
def test_against_reverse_mode(name, first):
    decoder, oracle = build(name, first)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no tangent rule.*")
        compare(decoder, latents(), oracle=oracle)
        assert_swept(decoder, oracle, latents())


@pytest.mark.parametrize("name", CASES)
def test_second_order(name):
    """Gradients of J's gradients, by autograd: no rule holds a factorisation constant."""
    decoder, oracle = build(name)
    found = []
    for backend, module in zip(BACKENDS, (decoder, oracle), strict=True):
        z = latents().requires_grad_()
        jacobian = decode_with_jacobian(module, z, backend=backend)[1]
        leaves = [z, decoder.weight]
        once = torch.autograd.grad(jacobian.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in once), leaves))
    for ours, theirs in zip(*found, strict=True):
        assert torch.isfinite(theirs).all()
        assert float((ours - theirs).abs().max()) <= TOLERANCE * (1 + float(theirs.abs().max()))


def differences(function, z, step=1e-5):
    """The derivative [B, m, ...] by central differences, right to about step^2."""
    steps = step * torch.eye(z.shape[1], dtype=z.dtype)
    return torch.stack([(function(z + e) - function(z - e)) / (2 * step) for e in steps], 1)


class OfRank(nn.Module):
    """The determinant of a matrix whose rank is `rank` at z = 0, and of an invertible one."""

    def __init__(self, rank):
        super().__init__()
        generator = torch.Generator().manual_seed(rank)
        draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
        values = torch.tensor([1.0, 1.5, 2.0, 2.5]) * (torch.arange(N) < rank)
        self.register_buffer("at_zero", LA.qr(draw(N, N)).Q * values @ LA.qr(draw(N, N)).Q)
        self.weight = nn.Parameter(draw(M, N, N))

    def forward(self, z):
        h = torch.einsum("bm,mij->bij", z, self.weight)
        both = torch.stack([self.at_zero + h + (h @ h).sin(), 2 * SPREAD + h], 1)
        return LA.det(both)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_determinant_of_any_rank(rank):
    """J and its gradients are finite and right at singular matrices.

    The oracle is the determinant as a sum over permutations: PyTorch divides by the determinant
    in its second derivative.
    """
    decoder, oracle = OfRank(rank), OfRank(rank)
    oracle.forward = lambda z: leibniz(decoder, z)
    oracle._parameters = decoder._parameters
    z = torch.zeros(3, M, dtype=torch.float64)
    compare(decoder, z, oracle=oracle)
    assert_swept(decoder, oracle, z)


def leibniz(decoder, z):
    h = torch.einsum("bm,mij->bij", z, decoder.weight)
    both = torch.stack([decoder.at_zero + h + (h @ h).sin(), 2 * SPREAD + h], 1)
    total = 0
    for order in itertools.permutations(range(N)):
        inversions = sum(a > b for a, b in itertools.combinations(order, 2))
        product = math.prod(both[..., i, j] for i, j in enumerate(order))
        total = total + (-1) ** inversions * product
    return total


@pytest.mark.parametrize("function", [LA.eigvalsh, LA.svdvals])
def test_equal_values(function):
    """At a multiple of the identity, J of the eigenvalues is finite, as reverse mode's is."""
    decoder = Decoder(lambda h: function(torch.eye(N) + 0.1 * (h + h.mT)), SQUARE, first=True)
    z = torch.zeros(2, M, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = (decode_with_jacobian(decoder, z, backend=b)[1] for b in BACKENDS)
    assert torch.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_no_derivative_of_the_logarithm_of_zero():
    decoder = Decoder(lambda h: LA.slogdet(h).logabsdet, SQUARE, first=True)
    z = torch.zeros(2, M, dtype=torch.float64)
    assert decode_with_jacobian(decoder, z)[1].isnan().all()


def test_a_singular_matrix_is_an_error():
    decoder = Decoder(lambda h: LA.solve(h, h), SQUARE, first=True)
    with pytest.raises(LA.LinAlgError, match="singular"):
        decode_with_jacobian(decoder, torch.zeros(2, M, dtype=torch.float64))


REFUSED = {
    "qr": (lambda h: LA.qr(h, "complete")[1], "5 rows and 3 columns.*use mode 'reduced'"),
    "svd": (lambda h: LA.svd(h)[1], "5 rows and 3 columns.*use full_matrices=False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=message) as caught:
        decode_with_jacobian(Decoder(function, (5, 3)), latents())
    assert "\n" not in str(caught.value)


def test_parameters_of_what_is_returned_as_well_are_not_swept():
    """The matrix of the old triangular_solve is a result, too: autograd takes its gradient."""

    def function(h, a):
        solution, matrix = torch.triangular_solve(h, well(a))
        return solution + matrix[..., :2]

    decoder = Decoder(function, (N, 2), [SQUARE])
    oracle = copy.copy(decoder)
    oracle.function = lambda h, a: LA.inv(well(a).triu()) @ h + well(a)[..., :2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare(decoder, latents(), oracle=oracle)
        assert Linearizer(decoder, latents()).plan(3).obstacles == [
            "triangular_solve has no adjoint"
        ]
