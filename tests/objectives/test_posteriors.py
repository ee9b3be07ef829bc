"""Objectives and encoders that change the posterior or its draws, against plain formulae."""

import math

import mpmath
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from fastsfvae.likelihoods import gaussian_kl, posterior_kl
from fastsfvae.objectives import (
    Coupling,
    DoublyReparameterized,
    FreeBits,
    HierarchicalImportanceWeighted,
    Householder,
    ImportanceWeighted,
    MinimumRate,
    ReweightedExpectationMaximization,
    Sampling,
    StickingTheLanding,
    VariationalLaplace,
)
from fastsfvae.objectives.draws import draw
from tests.objectives.plain import (
    B,
    C,
    Encoder,
    K,
    M,
    N,
    close,
    fill,
    log_density,
    model,
    normal,
    posterior,
    same_gradients,
    standard,
)


class _Given(nn.Module):
    """An encoder of what it is given."""

    def forward(self, x):
        return x


# --- free bits


def test_free_bits_from_the_formula():
    encoder, decoder, x = model()
    mean, log_var = encoder(x)
    of_batch = kl_divergence(posterior(mean, log_var), standard(mean)).mean(0)
    floor = float(of_batch.detach().median())
    objective = FreeBits(decoder, noise_var=C, samples=K, free_bits=floor + 1e-9)
    noise = normal(3, K, B, M)
    terms = objective.at_noise(x, mean, log_var, noise)
    log_likelihood = log_density(decoder, x, mean + (0.5 * log_var).exp() * noise).mean(0)
    value = log_likelihood
    for i in range(M):
        value = value - (of_batch[i] if of_batch[i] > floor + 1e-9 else floor + 1e-9)
    assert 0 < (of_batch > floor + 1e-9).sum() < M
    close(terms.objective, value.detach())
    close(terms.kl, gaussian_kl(mean, log_var).detach())
    same_gradients(terms.loss, -value.mean(), encoder, decoder)


def test_below_the_floor_a_dimension_has_the_decoders_gradient_alone():
    mean, log_var = normal(1, B, M), 0.3 * normal(2, B, M)
    mean[:, 0] *= 0.1
    mean, log_var = mean.requires_grad_(), log_var.requires_grad_()
    objective = FreeBits(lambda z: 0 * z, samples=2, free_bits=0.2)
    loss = objective(torch.zeros(B, M).double(), mean, log_var).loss
    for gradient in torch.autograd.grad(loss, (mean, log_var)):
        assert gradient[:, 0].abs().max() == 0 and gradient[:, 1:].abs().max(0).values.min() > 0


def test_no_free_bits_are_the_elbo():
    encoder, decoder, x = model()
    noise = normal(3, K, B, M)
    posterior = encoder(x)
    settings = {"noise_var": C, "samples": K}
    free = FreeBits(decoder, free_bits=0.0, **settings).at_noise(x, *posterior, noise)
    elbo = Sampling(decoder, **settings).at_noise(x, *posterior, noise)
    close(free.loss.detach(), elbo.loss.detach())
    same_gradients(free.loss, elbo.loss, encoder, decoder)
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="free_bits="):
            FreeBits(decoder, free_bits=wrong)


# --- delta-VAE

RATES = [1e-4, 0.05, 1.0, 10.0]


@pytest.mark.parametrize("rate", RATES)
def test_ends_are_lamberts(rate):
    with mpmath.workdps(40):
        at = -mpmath.exp(-2 * mpmath.mpf(rate) - 1)
        low, high = (float(mpmath.sqrt(-mpmath.lambertw(at, k).real)) for k in (0, -1))
    found = MinimumRate(_Given(), rate).ends
    assert found == pytest.approx((low, high), rel=1e-12) and low < 1 < high


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", RATES)
def test_every_rate_is_the_least_or_more(rate, dtype):
    wild = torch.tensor([-1e4, -30.0, -3.0, -0.1, 0.0, 0.1, 3.0, 30.0, 1e4], dtype=dtype)
    a, log_v = (t.clone().requires_grad_() for t in torch.meshgrid(wild, wild, indexing="ij"))
    mean, log_var = MinimumRate(_Given(), rate)((a, log_v))
    mu, v = mean.detach().double(), log_var.detach().double()
    kl = 0.5 * (mu**2 + v.exp() - 1 - v)
    rounding = 16 * torch.finfo(dtype).eps * (1 + rate)
    assert (kl - rate).min() > -rounding
    # No positive a: there is equality, but at the interval's ends for the floor of the root.
    assert (kl[a <= 0] - rate).abs().max() < 0.6e-6 + rounding
    inside = (a <= 0) & (log_v.abs() <= 3)
    assert (kl[inside] - rate).abs().max() < rounding
    of_a, of_log_v = torch.autograd.grad(gaussian_kl(mean, log_var).sum(), (a, log_v))
    assert of_a.isfinite().all() and of_log_v.isfinite().all()
    assert of_a[a < 0].abs().max() == 0 and of_a[a > 0].min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_are_positive_and_slopes_finite_at_the_very_ends(dtype):
    log_v = torch.tensor([[-1e4, -40.0, 40.0, 1e4]], dtype=dtype, requires_grad=True)
    for rate in torch.logspace(-4, 2, 61).tolist():
        mean, log_var = MinimumRate(_Given(), rate)((torch.zeros_like(log_v), log_v))
        (slope,) = torch.autograd.grad(gaussian_kl(mean, log_var).sum(), log_v)
        assert mean.isfinite().all() and mean.min() > 0
        assert log_var.isfinite().all() and slope.isfinite().all()


@pytest.mark.parametrize("rate", RATES)
def test_minimum_rate_from_its_formula(rate):
    encoder, decoder, x = model()
    wrapped = MinimumRate(encoder, rate)
    low, high = wrapped.ends
    a, log_v = encoder(x)
    s = low + (high - low) / (1 + torch.exp(-log_v))
    mu = torch.sqrt(2 * rate + 1 + torch.log(s * s) - s * s) + torch.where(a > 0, a, 0.0)
    mean, log_var = wrapped(x)
    # Of a small rate the root is of a difference.
    scale = 64 + 1 / rate
    close(mean.detach(), mu.detach(), scale)
    close((0.5 * log_var).exp().detach(), s.detach())
    noise = normal(3, K, B, M)
    terms = Sampling(decoder, noise_var=C, samples=K).at_noise(x, mean, log_var, noise)
    kl = kl_divergence(Normal(mu, s), standard(mu)).sum(-1)
    value = log_density(decoder, x, mu + s * noise).mean(0) - kl
    same_gradients(terms.loss, -value.mean(), encoder, decoder, scale=1000 + 10 / rate)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="min_rate="):
            MinimumRate(encoder, wrong)


# --- Householder


def _turned(householder, mean, log_var):
    """The mean and the covariance, an image and a reflection at a time."""
    means, covariances = [], []
    for mu, a in zip(mean, log_var, strict=True):
        v, U = torch.cat([mu, a]), torch.eye(len(mu), dtype=mu.dtype)
        for layer in householder.vectors:
            v = layer.weight @ v + layer.bias
            U = (torch.eye(len(mu), dtype=mu.dtype) - 2 * torch.outer(v, v) / v.dot(v)) @ U
        means.append(U @ mu)
        covariances.append(U @ torch.diag(a.exp()) @ U.T)
    return torch.stack(means), torch.stack(covariances)


@pytest.mark.parametrize("m, flows", [(1, 1), (1, 2), (3, 1), (3, 5)])
def test_householder_from_its_reflections(m, flows):
    encoder = fill(Encoder(m), 0.5)
    decoder = fill(nn.Sequential(nn.Linear(m, 8), nn.Tanh(), nn.Linear(8, N)), 0.5, seed=1)
    householder = fill(Householder(encoder, m, flows), 0.5, seed=4)
    x, noise = normal(2, B, N), normal(3, K, B, m)
    mean, L = householder(x)
    inner = encoder(x)
    expected, covariance = _turned(householder, *inner)
    close(mean.detach(), expected.detach())
    close((L @ L.mT).detach(), covariance.detach())
    assert torch.equal(L, L.tril()) and L.diagonal(dim1=-2, dim2=-1).min() > 0
    close(posterior_kl(mean, L).detach(), gaussian_kl(*inner).detach())
    assert m == 1 or L[:, 1, 0].abs().min() > 1e-3

    terms = Sampling(decoder, noise_var=C, samples=K).at_noise(x, mean, L, noise)
    z = expected + (torch.linalg.cholesky(covariance) @ noise.unsqueeze(-1)).squeeze(-1)
    prior = MultivariateNormal(torch.zeros(m).double(), torch.eye(m).double())
    kl = kl_divergence(MultivariateNormal(expected, covariance), prior)
    value = log_density(decoder, x, z).mean(0) - kl
    close(terms.objective, value.detach(), 1000)
    # A reflection of a line has no direction to learn.
    learned = (householder,) if m > 1 else (encoder,)
    same_gradients(terms.loss, -value.mean(), *learned, decoder, scale=10_000)


def test_householder_in_float32_keeps_small_variances():
    m = 6
    householder = fill(Householder(_Given(), m, 4), 0.5)
    mean = normal(1, 50, m)
    log_var = torch.linspace(math.log(1e-6), 0.0, m).double().expand(50, m)
    exact_mean, exact = householder((mean, log_var))
    single_mean, single = householder.float()((mean.float(), log_var.float()))
    assert single.dtype == single_mean.dtype == torch.float32
    torch.testing.assert_close(single_mean.double(), exact_mean, rtol=0, atol=2e-6)
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=2e-6)
    # The smallest deviation, 1e-3, keeps four digits.
    kl = gaussian_kl(mean, log_var)
    assert (posterior_kl(single_mean, single).double() - kl).abs().max() < 1e-3
    assert (posterior_kl(exact_mean, exact) - kl).abs().max() < 1e-11


def test_householder_needs_a_flow():
    with pytest.raises(ValueError, match="flows=0 must be at least 1"):
        Householder(Encoder(), M, 0)


# --- a full covariance


def test_sampling_of_a_factor_from_the_formula():
    _, decoder, x = model()
    of_mean, layer = fill(nn.Linear(N, M), 0.5), fill(nn.Linear(N, M * M), 0.4, seed=7)
    mean = of_mean(x)
    # Any factor will do, triangular or not.
    L = torch.eye(M).double() + layer(x).unflatten(-1, (M, M))
    noise = normal(3, K, B, M)
    settings = {"noise_var": C, "samples": K, "kl_weight": 1.7}
    terms = Sampling(decoder, **settings).at_noise(x, mean, L, noise)
    z = torch.stack([torch.einsum("bij,bj->bi", L, e) + mean for e in noise])
    prior = MultivariateNormal(torch.zeros(M).double(), torch.eye(M).double())
    kl = kl_divergence(MultivariateNormal(mean, L @ L.mT), prior)
    log_likelihood = log_density(decoder, x, z).mean(0)
    value = log_likelihood - 1.7 * kl
    close(terms.objective, value.detach(), 1000)
    close(terms.kl, kl.detach(), 1000)
    close(terms.log_likelihood, log_likelihood.detach())
    same_gradients(terms.loss, -value.mean(), decoder, layer, of_mean, scale=10_000)


def test_a_factors_draws_have_its_density():
    mean, noise = normal(1, B, M), normal(3, K, B, M)
    L = torch.eye(M).double() + 0.4 * normal(2, B, M, M)
    z, log_ratio = draw(mean, L, noise)
    log_q = MultivariateNormal(mean, L @ L.mT).log_prob(z)
    close(log_ratio, standard(z).log_prob(z).sum(-1) - log_q, 1000)


@pytest.mark.parametrize("size", [3, 6])
def test_a_diagonal_factor_is_its_log_var(size):
    encoder, decoder, _ = model()
    x, noise = normal(2, size, N), normal(3, M, size, M)
    mean, log_var = encoder(x)
    objective = Sampling(decoder, noise_var=C, samples=M)
    terms = objective.at_noise(x, mean, log_var, noise)
    factor = torch.diag_embed(torch.exp(0.5 * log_var))
    of_factor = objective.at_noise(x, mean, factor, noise)
    for one, other in zip(of_factor, terms, strict=True):
        close(one.detach(), other.detach())
    same_gradients(of_factor.loss, terms.loss, encoder, decoder)


@pytest.mark.parametrize("size", [M, B])
@pytest.mark.parametrize(
    "make",
    [
        lambda decoder: ImportanceWeighted(decoder, samples=M),
        lambda decoder: ImportanceWeighted(decoder, samples=M, proposal="linearized"),
        lambda decoder: StickingTheLanding(decoder, samples=M),
        lambda decoder: DoublyReparameterized(decoder, samples=M),
        lambda decoder: VariationalLaplace(decoder, samples=M),
        lambda decoder: FreeBits(decoder, samples=M, free_bits=0.1),
        lambda decoder: ReweightedExpectationMaximization(decoder, samples=M),
        lambda decoder: HierarchicalImportanceWeighted(decoder, Coupling(M, M).double()),
    ],
    ids=["iwae", "linearized", "stl", "dreg", "vlae", "free-bits", "rem", "h-iwae"],
)
def test_a_factor_is_refused_where_it_has_no_meaning(make, size):
    _, decoder, _ = model()
    x, mean = normal(2, size, N), normal(3, size, M)
    factor = torch.eye(M).double().expand(size, M, M)
    with pytest.raises(ValueError, match=r"must both be \[B, m\]") as refused:
        make(decoder)(x, mean, factor)
    assert "\n" not in str(refused.value)


# --- half precision


@pytest.mark.parametrize("name", ["free-bits", "delta-vae", "householder"])
def test_posteriors_in_half_precision_are_float32s(name):
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(M, 6), nn.Tanh(), nn.Linear(6, N))
    x = torch.randn(50, N)
    posterior = tuple((0.3 * torch.randn(2, 50, M)).bfloat16())
    encoder = {
        "delta-vae": MinimumRate(_Given(), 0.1),
        "householder": fill(Householder(_Given(), M, 3), 0.5).float(),
    }.get(name, _Given())
    free = {"free_bits": 0.1} if name == "free-bits" else {}
    objective = (FreeBits if free else Sampling)(decoder, samples=K, **free)
    terms = []
    for enabled in (True, False):
        given = posterior if enabled else tuple(t.float() for t in posterior)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = objective(x, *encoder(given), generator=torch.Generator().manual_seed(1))
        terms.append(found)
    assert {term.dtype for term in terms[0]} == {torch.float32}
    torch.testing.assert_close(terms[0].kl, terms[1].kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms[0].objective, terms[1].objective, rtol=0, atol=0.15)
