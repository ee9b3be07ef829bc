"""woodbury: the register factorisation against its float64 twin, and its pivot rule."""

import pytest
import torch

from fastsfvae import reference
from fastsfvae.ops import _library
from fastsfvae.ops.woodbury import (
    Woodbury,
    gram_woodbury_triton,
    woodbury_native,
    woodbury_triton,
)
from tests._triton import DEVICE, assert_as_good, requires_triton

pytestmark = requires_triton

SIZES = [1, 2, 5, 16, 33, 64]


def problem(B, m, n, *, scale=1.0, log_h=(-3.0, 1.0), c=0.5, seed=0):
    """Float32 (G, p, rr, h, c) of a random J [B, m, n] and r."""
    g = torch.Generator().manual_seed(seed)
    J = torch.randn(B, m, n, generator=g) * scale / n**0.5
    r = torch.randn(B, n, generator=g)
    low, high = log_h
    h = 10 ** (low + (high - low) * torch.rand(B, m, generator=g))
    inputs = (*reference.gram_project(J, r), h, torch.full((B,), c))
    return tuple(t.to(DEVICE) for t in inputs)


def check(inputs, got):
    want = woodbury_native(*(t.double() for t in inputs))
    plain = woodbury_native(*inputs)
    for name, g, w, p in zip(Woodbury._fields, got, want, plain, strict=True):
        if name == "lost":
            assert torch.equal(g, w)
        else:
            assert_as_good(g, w, p, max(1.0, w.abs().max().item()))


@pytest.mark.parametrize("m", SIZES)
def test_against_float64(m, poisoned_empty):
    inputs = problem(2, m, 3 * m)
    check(inputs, woodbury_triton(*inputs))


@pytest.mark.parametrize("log_h", [(-20.0, -18.0), (-12.0, 1.0), (3.0, 4.0)])
def test_extreme_latent_variances(log_h):
    inputs = problem(2, 5, 40, log_h=log_h)
    check(inputs, woodbury_triton(*inputs))


def test_zero_latent_variance_and_zero_gram():
    G, p, rr, h, c = problem(2, 4, 20)
    h[0], G[1], p[1] = 0.0, 0.0, 0.0
    got = woodbury_triton(G, p, rr, h, c)
    for name in ("log_det", "explained", "y", "q"):
        assert (getattr(got, name) == 0).all(), name
    # Every pivot is exactly c, which is not lost.
    assert not got.lost.any()


@pytest.mark.parametrize("m", [5, 33])
def test_partial_sums_are_added(m):
    from fastsfvae.kernels.woodbury import woodbury_fwd

    G, p, rr, h, c = problem(2, m, 2 * m)
    shares = torch.tensor([0.25, 0.5, 0.25], device=DEVICE)
    parts = [t * shares.view(-1, *[1] * t.dim()) for t in (G, p, rr)]
    for part, whole in zip(woodbury_fwd(*parts, h, c), woodbury_fwd(G, p, rr, h, c), strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)


def bad_problem(seed):
    """Repeated and nearly repeated tangents, more of them than n, eigenvalues up to 1e12 c."""
    g = torch.Generator().manual_seed(seed)
    J = torch.randn(4, 12, 7, generator=g) * 10 ** (6 * torch.rand(4, 12, 1, generator=g) - 1)
    J[:, 1] = J[:, 0]
    J[:, 3] = J[:, 2] * (1 + 1e-7)
    r = torch.randn(4, 7, generator=g)
    c = torch.full((4,), 0.1)
    h = 10 ** (4 * torch.rand(4, 12, generator=g))
    return tuple(t.to(DEVICE) for t in (*reference.gram_project(J, r), h, c))


@pytest.mark.parametrize("seed", range(3))
def test_lost_pivots_stay_finite_and_bounded(seed):
    inputs = bad_problem(seed)
    rr, c = inputs[2], inputs[4]
    got = woodbury_triton(*inputs)
    assert got.lost.all()
    assert all(t.isfinite().all() for t in got)
    assert (got.explained >= 0).all() and (got.explained <= rr).all()
    assert (got.log_det >= 0).all()
    # C^-1 is at most 1/c; a floor that still eliminated would exceed it by orders of magnitude.
    assert (got.w.norm(dim=-1) * c <= 10 * (inputs[1] * inputs[3].sqrt()).norm(dim=-1)).all()


def test_lost_pivot_follows_the_rule_by_hand():
    # The second tangent repeats the first: its pivot is c in exact arithmetic and noise in float32.
    G = torch.full((1, 2, 2), 1e9, device=DEVICE)
    p, rr = torch.tensor([[3e4, 3e4]], device=DEVICE), torch.tensor([2.0], device=DEVICE)
    h, c = torch.ones(1, 2, device=DEVICE), torch.tensor([0.5], device=DEVICE)
    got = woodbury_triton(G, p, rr, h, c)
    pivot = 1e9 + 0.5
    floor = 4 * 2.0**-23 * pivot
    assert got.lost.item()
    expected = torch.tensor([pivot / 0.5, floor / 0.5]).double().log().sum()
    torch.testing.assert_close(got.log_det.double().cpu(), expected[None], rtol=1e-6, atol=0)
    torch.testing.assert_close(got.explained.cpu(), torch.tensor([0.9]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("difference, lost", [(0.1, False), (0.01, True)])
def test_lost_also_means_fewer_than_half_of_the_digits(difference, lost):
    # The second pivot is about difference^2 of C_kk, on either side of sqrt(eps) = 3.5e-4.
    J = torch.tensor([[[1e3, 0.0], [1e3, 1e3 * difference]]], device=DEVICE)
    r, h, c = (torch.ones(shape, device=DEVICE) for shape in ((1, 2), (1, 2), (1,)))
    inputs = (*reference.gram_project(J, r), h, c)
    assert woodbury_triton(*inputs).lost.item() == lost
    assert woodbury_native(*inputs).lost.item() == lost


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_input_spoils_its_own_sample_only(index, value):
    inputs = problem(3, 4, 20)
    clean = woodbury_triton(*inputs)
    spoiled_inputs = [t.clone() for t in inputs]
    spoiled_inputs[index][1] = value
    spoiled = woodbury_triton(*spoiled_inputs)
    for a, b in zip(clean, spoiled, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    if index in (0, 3):
        assert not spoiled.log_det[1].isfinite()
    if index == 1:
        assert not spoiled.w[1].isfinite().any()


def test_two_runs_give_the_same_bits():
    inputs = problem(2, 33, 50)
    runs = [woodbury_triton(*inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("B, m, n", [(1, 5, 3000), (3, 16, 40)])
def test_partial_sums_are_added_up_in_the_factorisation(B, m, n, poisoned_empty):
    g = torch.Generator().manual_seed(0)
    J, r = (torch.randn(*s, generator=g).to(DEVICE) / n**0.5 for s in ((B, m, n), (B, n)))
    h, c = torch.rand(B, m, generator=g).to(DEVICE), torch.full((B,), 0.5, device=DEVICE)
    sums, solved = gram_woodbury_triton(J, r, h, c)
    want = reference.gram_project(J.double(), r.double())
    for got, exact, plain in zip(sums, want, reference.gram_project(J, r), strict=True):
        assert_as_good(got, exact, plain, exact.abs().max())
    check((*sums, h, c), solved)


def test_opcheck():
    G, p, _, h, c = problem(2, 3, 9)
    torch.library.opcheck(_library.gram_woodbury, (G, p, h, c))
    torch.library.opcheck(_library.woodbury, problem(2, 3, 9))


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="m=65 does not fit"):
        woodbury_triton(*problem(1, 65, 70))
    G, p, rr, h, c = problem(1, 3, 9)
    with pytest.raises(TypeError, match="p has dtype torch.bfloat16"):
        woodbury_triton(G, p.bfloat16(), rr, h, c)
