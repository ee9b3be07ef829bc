"""log det and inverse root of C = G + cI: values, the float64 rescue, and what is singular."""

import pytest
import torch

from fastsfvae.kernels.gram_project import gram_project_partials
from fastsfvae.kernels.woodbury_float64 import gram_float64
from fastsfvae.ops.elbo import Parts
from fastsfvae.ops.log_det import log_det_of_parts, log_det_of_sums
from fastsfvae.ops.low_rank import float64_sums
from fastsfvae.ops.woodbury import log_det_native
from tests._triton import DEVICE, requires_triton

C = [None, 0.3]


def jacobian(m, n, condition, dtype=torch.float32, B=1):
    """J in whole digits of `dtype`, its singular values from 1 down to 1 / condition."""
    g = torch.Generator().manual_seed(m + n)
    left, _ = torch.linalg.qr(torch.randn(B, m, m, generator=g, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(B, n, m, generator=g, dtype=torch.float64))
    values = torch.logspace(0, -torch.tensor(condition).log10(), m, dtype=torch.float64)
    return (left @ values.diag() @ right.mT).to(dtype)


def exact(J, c):
    """By singular values: log det is exact to eps times the condition of J, not its square."""
    values = torch.linalg.svdvals(J.double()).square() + (c or 0)
    C = J.double() @ J.double().mT + (c or 0) * torch.eye(J.shape[1], dtype=torch.float64)
    return values.log().sum(-1), torch.linalg.inv(C)


def given(c, J):
    return None if c is None else torch.tensor(c, dtype=J.dtype, device=J.device)


def found(J, c, rescue=True):
    redo = float64_sums(J, torch.zeros_like(J[:, 0])) if rescue else None
    return log_det_of_sums(J @ J.mT, given(c, J), None, redo)


@pytest.mark.parametrize("c", C)
@pytest.mark.parametrize("m, n", [(1, 1), (3, 3), (5, 12), (33, 40), (70, 90)])
def test_float64(m, n, c):
    J = jacobian(m, n, 30.0, torch.float64, B=3)
    value, root, lost = found(J, c)
    inverse = root.mT @ root
    right, right_inverse = exact(J, c)
    assert not lost.any()
    assert (value - right).abs().max() <= 1e-12 * m * (1 + right.abs().max())
    assert (inverse - right_inverse).abs().max() <= 1e-12 * m * right_inverse.abs().max()


@pytest.mark.parametrize("condition", [1e3, 1e5, 1e6])
@pytest.mark.parametrize("m, n", [(2, 7), (5, 30), (33, 40)])
def test_lost_samples_are_redone_in_float64(m, n, condition):
    J = torch.cat([jacobian(m, n, 3.0, B=2), jacobian(m, n, condition, B=3)])
    value, root, lost = found(J, None)
    inverse = root.double().mT @ root.double()
    right, right_inverse = exact(J, None)
    # Pivots that keep fewer than half of float64's digits are still marked.
    assert not lost[: 5 if condition < 1e4 else 2].any()
    # What rounding G to float64 costs where the smallest eigenvalue is 1 / condition^2.
    floor = 8 * m * torch.finfo(torch.float64).eps * condition**2
    eps = torch.finfo(torch.float32).eps
    assert (value - right).abs().max() <= floor + 4 * eps * right.abs().max()
    # What was not lost has float32's own rounding, of a condition of 9.
    error = (inverse - right_inverse).flatten(1).abs().amax(1)
    scale = right_inverse.flatten(1).abs().amax(1)
    assert (error[2:] <= (floor + 4 * eps) * scale[2:]).all()
    assert (error[:2] <= 64 * m * eps * scale[:2]).all()
    alone = found(J, None, rescue=False)
    assert alone.lost.tolist() == [False, False, True, True, True]
    assert torch.equal(alone.value[:2], value[:2]) and torch.equal(alone.root[:2], root[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_samples(dtype):
    J = jacobian(3, 7, 2.0, dtype, B=4).round(decimals=2)
    # Whole numbers, whose pivot is 0 exactly.
    J[1] = torch.tensor([[1.0], [2.0], [-1.0]]).to(dtype)
    J[2, 1] = 0
    for c in C:
        value, root, lost = found(J, c)
        inverse = root.mT @ root
        assert value[[0, 3]].isfinite().all() and inverse.isfinite().all()
        if c is None:
            assert lost.tolist() == [False, True, True, False]
            assert (value[1:3] == -torch.inf).all() and not inverse[1:3].any()
        else:
            right, right_inverse = exact(J, float(given(c, J)))
            eps = torch.finfo(dtype).eps
            assert not lost.any()
            assert (value - right).abs().max() <= 16 * eps * (1 + right.abs().max())
            assert (inverse - right_inverse).abs().max() <= 400 * eps * right_inverse.abs().max()


def test_what_rests_on_the_floor_is_bounded_and_marked():
    J = torch.ones(1, 3, 5, dtype=torch.float64)
    value, root, lost = found(J, 1e-30)
    assert lost.all() and root.isfinite().all()
    # Not below what c alone gives, nor above what every pivot at C_kk would.
    assert 3 * torch.tensor(1e-30).log() <= value <= 3 * torch.tensor(5.0).log()


def test_beyond_the_range_of_float32():
    J = jacobian(2, 5, 3.0, B=3)
    J[0] *= 1e25
    J[1] *= 1e-25
    right, _ = exact(J, None)
    value, root, lost = found(J, None)
    assert (value - right).abs().max() <= 1e-6 * right.abs().max()
    # C^-1 of 1e50 is no float32, its root is.
    assert not lost.any() and root.isfinite().all()
    assert found(J, None, rescue=False).lost[:2].all()
    want = torch.linalg.pinv(J.double()).mT
    assert (root.mT @ (root @ J) - want).abs().amax((1, 2)).le(1e-6 * want.abs().amax((1, 2))).all()


@pytest.mark.parametrize("c", C)
def test_a_nan_spoils_its_own_sample_only(c):
    J = jacobian(3, 7, 2.0, B=3)
    want = found(J, c)
    J[1, 0, 0] = torch.nan
    value, _, lost = found(J, c)
    assert value.isnan().tolist() == lost.tolist() == [False, True, False]
    assert torch.equal(value[::2], want.value[::2])


def test_a_gram_that_is_the_rest_of_something_larger():
    # A relative rounding of 1e-9 of G, told by its scale, makes this pivot noise.
    G = torch.tensor([[[1.0, 1.0], [1.0, 1.0 + 1e-6]]], dtype=torch.float64)
    assert not log_det_native(G, None).lost
    scale = torch.full((1, 2), 1e7, dtype=torch.float64)
    told = log_det_native(G, None, scale)
    assert told.lost and told.value.isfinite()
    singular = log_det_native(G, None, 1e4 * scale)
    assert singular.lost and singular.value == -torch.inf


class TestKernels:
    pytestmark = requires_triton

    @pytest.mark.parametrize("c", C)
    @pytest.mark.parametrize("m, n", [(1, 3), (5, 30), (18, 40)])
    def test_the_same_on_the_device(self, m, n, c):
        J = torch.cat([jacobian(m, n, 3.0, B=2), jacobian(m, n, 1e5, B=2)]).to(DEVICE)
        J[1, 0] = 0
        r = torch.zeros_like(J[:, 0])
        parts = Parts(gram_project_partials(J, r), lambda lost: gram_float64(J, r, lost))
        value, inverse, lost = log_det_of_parts(parts, given(c, J))
        right, root, _ = found(J.cpu(), c)
        # Ordinary; without a pivot; of a condition that float32 cannot multiply with, if any.
        assert lost.tolist() == [False, c is None, *[c is None and m > 1] * 2]
        eps = torch.finfo(torch.float32).eps
        for g, w in (value, right), (inverse, root.mT @ root):
            g, keep = g.cpu(), w.isfinite()
            assert torch.equal(g.isfinite(), keep)
            scale = w[keep].abs().max() + m * abs(torch.tensor(c or 1.0).log())
            assert (g - w)[keep].abs().max() <= 64 * m * eps * scale

    def test_rounded_tangents_stay_lost(self):
        J = jacobian(3, 7, 1e5).to(DEVICE)
        parts = Parts(gram_project_partials(J, torch.zeros_like(J[:, 0])), None)
        assert log_det_of_parts(parts, None)[2].all()
