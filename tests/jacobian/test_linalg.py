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
from tests.jacobian.linalg_cases import CASES, LA, SPREAD, SQUARE, Decoder, M, N, build, well
from tests.jacobian.test_rules import compare

BACKENDS = "torch", "reference"
# Of PyTorch's: two old names, and what torch.func has no batching for.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated in favor of"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]


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
