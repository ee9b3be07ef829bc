"""woodbury_float64: lost samples, redone on the device, against the factorisation in float64."""

import pytest
import torch

from fastsfvae import reference
from fastsfvae.ops.low_rank import low_rank_forward
from fastsfvae.ops.woodbury import (
    Woodbury,
    gram_woodbury_triton,
    woodbury_native,
    woodbury_triton,
)
from tests._triton import DEVICE, requires_triton

pytestmark = requires_triton
C = 0.25


def spectrum(m, n, ratio, generator):
    """J [m, n] whose singular values fall from 100 to 100 / ratio."""
    left = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator).double()).Q
    values = 100 * torch.logspace(0, 1, m, base=1 / ratio, dtype=torch.float64)
    return (left * values)[:, : right.shape[1]] @ right.T


def problem(m, n):
    """Four samples: harmless, singular values over 1e6, a row repeated, and more rows than n."""
    g = torch.Generator().manual_seed(m + n)
    J = torch.stack([spectrum(m, n, ratio, g) for ratio in (2.0, 1e6, 2.0, 2.0)]).float()
    J[2, m // 2] = J[2, 0]
    J[3, :, min(m, n) // 2 :] = 0
    r = torch.randn(4, n, generator=g)
    h = 10 ** (4 * torch.rand(4, m, generator=g))
    h[0] = 1e-3
    return [t.to(DEVICE) for t in (J, r, h, torch.full((4,), C))]


def exact(J, r, h, c):
    sums = reference.gram_project(J.double(), r.double())
    return woodbury_native(*sums, h.double(), c.double())


def assert_rescued(got, J, r, h, c):
    want = exact(J, r, h, c)
    A = h.double().sqrt().unsqueeze(-1) * J.double()
    largest = torch.linalg.matrix_norm(A, 2).square().max().item()
    # Backward error of the factorisation in float64, and one rounding of what is stored.
    rounding = 8 * J.shape[1] * 2.0**-52 * largest / C + 2.0**-22
    for name, g, w in zip(Woodbury._fields, got, want, strict=True):
        if name != "lost":
            assert (g.double() - w).abs().max() <= rounding * w.abs().max().clamp(min=1), name


@pytest.mark.slow
@pytest.mark.parametrize("m, n", [(2, 3), (5, 40), (16, 1100), (33, 20), (64, 70)])
def test_extreme_spectra(m, n, poisoned_empty):
    J, r, h, c = problem(m, n)
    sums, got = gram_woodbury_triton(J, r, h, c)
    alone = woodbury_triton(*sums, h, c)
    assert alone.lost[1:].any() and not alone.lost[0]
    assert_rescued(got, J, r, h, c)
    kept = ~alone.lost
    for name, mine, before in zip(Woodbury._fields, got, alone, strict=True):
        # What was not lost keeps its bits.
        assert torch.equal(mine[kept], before[kept]), name
    again = woodbury_triton(*sums, h, c, J, r)
    assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True))


def test_float32_alone_is_wrong_there():
    J, r, h, c = problem(5, 40)
    sums, got = gram_woodbury_triton(J, r, h, c)
    alone, want = woodbury_triton(*sums, h, c), exact(J, r, h, c)
    wrong = (alone.log_det - want.log_det).abs()
    assert wrong[alone.lost].max() > 1e-2 > 1e3 * (got.log_det - want.log_det).abs().max()


def test_any_strides_and_the_second_system():
    J, r, h, c = problem(5, 40)
    tangent_major = J.transpose(0, 1).contiguous().transpose(0, 1)
    solved = low_rank_forward(tangent_major, r, h, c.expand(4), 0.5 * h, "triton")
    assert_rescued(solved.first, J, r, h, c)
    assert_rescued(solved.second, J, r, 0.5 * h, c)
    sliced = J.repeat_interleave(2, dim=-1)[..., ::2]
    assert sliced.stride(-1) == 2
    assert_rescued(gram_woodbury_triton(sliced, r, h, c)[1], J, r, h, c)


def test_half_precision_tangents_stay_lost():
    J, r, h, c = problem(5, 40)
    lost = gram_woodbury_triton(J.bfloat16(), r, h, c)[1].lost
    assert torch.equal(
        lost, woodbury_triton(*reference.gram_project(J.bfloat16().float(), r), h, c).lost
    )
    with pytest.raises(TypeError, match="J has dtype torch.bfloat16: rounded tangents cannot"):
        sums = reference.gram_project(J, r)
        woodbury_triton(*sums, h, c, J.bfloat16(), r)
