"""elbo: the objective and its cotangents in one launch, against autograd in float64."""

import math

import pytest
import torch

from fastsfvae import reference
from fastsfvae.kernels._contract import WOODBURY_MAX_M
from fastsfvae.ops.elbo import Parts, elbo_of_parts
from tests._triton import DEVICE, assert_as_good, poisoned_empty, requires_triton

# pytest finds the fixture by its name in this module.
_ = poisoned_empty
pytestmark = requires_triton
LIKELIHOODS = ("precision", "mixture", "normalized", "expected")
SIZES = (1, 15, 16, 17, 64)
NAMES = "elbo log_likelihood kl squared_error log_det explained".split()
NAMES += "M u g_rr d_mean d_log_var d_scalars".split()
B, C, GAMMA, KL_WEIGHT = 3, 0.3, 0.6, 0.8


def jacobian(m, n, seed=0):
    """J [B, m, n] and r [B, n], with tangents of very different lengths."""
    g = torch.Generator().manual_seed(seed + m)
    J = torch.randn(B, m, n, generator=g) * 10 ** torch.linspace(-1.5, 0.5, m)[:, None]
    return (J / n**0.5).to(DEVICE), torch.randn(B, n, generator=g).to(DEVICE)


def latents(m, gamma=GAMMA):
    """Mean, log h, c, gamma, kl_weight, weights; some h are 0 in float32, some weights 0 or < 0."""
    g = torch.Generator().manual_seed(1)
    mean, log_var = torch.randn(B, m, generator=g), 2 * torch.randn(B, m, generator=g)
    log_var[1, m // 2] = -200.0
    scalars = [torch.tensor(v) for v in (C, gamma, KL_WEIGHT)]
    return [t.to(DEVICE) for t in (mean, log_var, *scalars, torch.tensor([0.5, -1.25, 0.0]))]


def formula(G, p, rr, mean, log_var, c, gamma, kl_weight, n, likelihood):
    """The objective's terms as they read; c, gamma and kl_weight one a sample."""
    s, c_ = (0.5 * log_var).exp(), c[:, None]
    A = s[:, :, None] * G * s[:, None, :]

    def log_det(A):
        return torch.linalg.slogdet(A / c_[..., None] + torch.eye(A.shape[-1]).to(A)).logabsdet

    kl = 0.5 * (log_var.exp() + mean**2 - 1 - log_var).sum(-1)
    weight_of_log_det = gamma if likelihood == "mixture" else 1.0
    if likelihood == "expected":
        term, explained = A.diagonal(dim1=-2, dim2=-1).sum(-1) / c, 0.0 * rr
    else:
        K = A + torch.diag_embed(c_.expand_as(s))
        v = s * p
        term, explained = log_det(A), (v * torch.linalg.solve(K, v)).sum(-1)
    if likelihood == "normalized":
        term = term - log_det((1 - gamma[:, None, None]) * A)
    value = -0.5 * n * (2 * math.pi * c).log() - 0.5 * weight_of_log_det * term
    value = value - (rr - gamma * explained) / (2 * c)
    return value - kl_weight * kl, value, kl, rr, term, explained


def by_autograd(sums, given, n, likelihood, dtype):
    """Everything in NAMES, in `dtype`."""
    mean, log_var, *scalars, weights = given
    leaves = [*sums, mean, log_var, *(t.expand(B) for t in scalars)]
    leaves = [t.detach().to(dtype).clone().requires_grad_() for t in leaves]
    terms = formula(*leaves, n, likelihood)
    grads = torch.autograd.grad(
        terms[0], leaves, weights.to(dtype), allow_unused=True, materialize_grads=True
    )
    dG, dp, drr, d_mean, d_log_var, *d_scalars = grads
    rest = dG + dG.mT, dp, drr, d_mean, d_log_var, torch.stack(d_scalars)
    return dict(zip(NAMES, [*(t.detach() for t in terms), *rest], strict=True))


def check(found, sums, given, n, likelihood):
    exact = tuple(t.double() for t in sums)
    want = by_autograd(exact, given, n, likelihood, torch.float64)
    plain = by_autograd(sums, given, n, likelihood, torch.float32)
    for name, right in want.items():
        # Sums whose terms cancel: those of the pivots, and n times a logarithm.
        scale = max(1.0, right.abs().max().item())
        scale = max(scale, n / C) if name in ("d_scalars", "elbo", "log_likelihood") else scale
        assert_as_good(getattr(found, name), right, plain[name], 2 * scale)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("m", SIZES)
def test_every_output_against_float64(m, likelihood, poisoned_empty):
    n = 3 * m + 2
    J, r = jacobian(m, n)
    sums, given = reference.gram_project(J, r), latents(m)
    parts = Parts(tuple(t[None] for t in sums), None)
    found = elbo_of_parts(parts, given[:5], given[5], n, likelihood)
    assert not found.lost.any()
    check(found, sums, given, n, likelihood)
    if m == 17:
        again = elbo_of_parts(parts, given[:5], given[5], n, likelihood)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_the_ends_of_gamma(gamma, likelihood):
    n, given = 20, latents(5, gamma)
    sums = reference.gram_project(*jacobian(5, n))
    parts = Parts(tuple(t[None] for t in sums), None)
    check(elbo_of_parts(parts, given[:5], given[5], n, likelihood), sums, given, n, likelihood)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_partial_sums_are_added_up(likelihood):
    n, given = 20, latents(5)
    sums = reference.gram_project(*jacobian(5, n))
    shares = torch.tensor([0.25, 0.5, 0.25], device=DEVICE)
    parts = Parts(tuple(t * shares.view(-1, *[1] * t.dim()) for t in sums), None)
    check(elbo_of_parts(parts, given[:5], given[5], n, likelihood), sums, given, n, likelihood)


def test_weights_of_latent_variance_zero_pull_nothing():
    given = latents(4)
    given[1][:] = -300.0
    sums = reference.gram_project(*jacobian(4, 9))
    parts = Parts(tuple(t[None] for t in sums), None)
    found = elbo_of_parts(parts, given[:5], given[5], 9, "normalized")
    for name in ("log_det", "explained", "M", "u"):
        assert (getattr(found, name) == 0).all(), name
    # The gradient of -log h / 2, in the divergence.
    assert torch.equal(found.d_log_var, (0.5 * KL_WEIGHT * given[5])[:, None].expand(B, 4))


def nearly_singular(m, n):
    """J and r whose last two samples float32 cannot resolve: two rows almost the same."""
    J, r = jacobian(m, n)
    J[1:] *= 1000
    J[1] *= 10 ** torch.linspace(0, -6, m, device=DEVICE)[:, None]
    J[1, m // 2] += J[1, 0]
    J[2, m - 1] = J[2, 0]
    return J, r


def gram_float64(J, r):
    def redo(lost):
        G, p, rr = reference.gram_project(J.double(), r.double())
        for t in (G, p, rr):
            t[~lost] = float("nan")
        return G[None], p[None], rr[None]

    return redo


@pytest.mark.slow
@pytest.mark.parametrize(
    "m, likelihood",
    [
        *((2, "mixture"), (16, "precision"), (16, "mixture"), (16, "normalized")),
        *((33, "normalized"), (64, "precision")),
    ],
)
def test_lost_samples_are_redone_in_float64(m, likelihood, poisoned_empty):
    n = 2 * m
    J, r = nearly_singular(m, n)
    sums, given = reference.gram_project(J, r), latents(m)
    given[1][:] = torch.linspace(1, 4, m, device=DEVICE)
    given[5][:] = torch.tensor([0.5, -1.25, 2.0])
    given[2].fill_(0.1)
    parts = tuple(t[None] for t in sums)
    alone = elbo_of_parts(Parts(parts, None), given[:5], given[5], n, likelihood)
    found = elbo_of_parts(Parts(parts, gram_float64(J, r)), given[:5], given[5], n, likelihood)
    assert alone.lost.tolist() == [False, True, True] and not found.lost.any()
    want = by_autograd(
        reference.gram_project(J.double(), r.double()), given, n, likelihood, torch.float64
    )
    for name, right in want.items():
        mine, kept = getattr(found, name), getattr(alone, name)
        samples = (slice(None), 0) if name == "d_scalars" else (0,)
        assert torch.equal(mine[samples], kept[samples]), name
        lost = (slice(None), alone.lost) if name == "d_scalars" else (alone.lost,)
        error = (mine.double() - right)[lost].abs().max()
        scale = right[lost].abs().max().clamp(min=1)
        assert error <= 1e-5 * scale, name
    before, after = (abs(t.log_det - want["log_det"])[alone.lost].max() for t in (alone, found))
    assert before > 10 * after


# The other two factorise the same matrix as "normalized" does first.
@pytest.mark.parametrize("likelihood", ["normalized", "expected"])
@pytest.mark.parametrize("index", range(6))
def test_what_is_not_finite_spoils_its_own_sample_only(index, likelihood):
    n, given = 20, latents(4)
    sums = [t.clone() for t in reference.gram_project(*jacobian(4, n))]
    clean = elbo_of_parts(
        Parts(tuple(t[None] for t in sums), None), given[:5], given[5], n, likelihood
    )
    tensors = [*sums, given[0], given[1], given[5]]
    tensors[index][1] = float("nan")
    spoiled = elbo_of_parts(
        Parts(tuple(t[None] for t in sums), None), given[:5], given[5], n, likelihood
    )
    for name, a, b in zip(clean._fields, clean, spoiled, strict=True):
        axis = 1 if name == "d_scalars" else 0
        rest = torch.tensor([0, 2], device=DEVICE)
        assert torch.equal(a.index_select(axis, rest), b.index_select(axis, rest)), name
    assert spoiled.elbo[1].isfinite() == (index == 5 or (index == 1 and likelihood == "expected"))


def test_refuses_what_does_not_fit():
    given = latents(4)
    parts = tuple(t[None] for t in reference.gram_project(*jacobian(4, 9)))
    with pytest.raises(TypeError, match="log_var has dtype torch.float64: this kernel takes fl"):
        bad = [given[0], given[1].double(), *given[2:5]]
        elbo_of_parts(Parts(parts, None), bad, given[5], 9, "precision")
    m = WOODBURY_MAX_M + 1
    parts = tuple(t[None] for t in reference.gram_project(*jacobian(m, 9)))
    given = latents(m)
    with pytest.raises(ValueError, match="m=65 does not fit the registers"):
        elbo_of_parts(Parts(parts, None), given[:5], given[5], 9, "precision")
