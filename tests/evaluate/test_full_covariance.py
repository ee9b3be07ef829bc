"""Estimators of a posterior with a full covariance, by its factor."""

import math

import pytest
import torch
from torch import nn

from fastsfvae import evaluate

N, M, C = 3, 2, 0.3


def _problem():
    torch.manual_seed(0)
    decoder = nn.Linear(M, 5).double()
    x, mean = torch.randn(N, 5).double(), torch.randn(N, M).double()
    factor = torch.randn(N, M, M).double().tril()
    # Wider than the posterior: narrower, and the weights would have no variance.
    factor.diagonal(dim1=-2, dim2=-1).abs_().add_(0.8)
    return decoder, x, mean, factor


def _model(decoder):
    """p(x) of the linear decoder."""
    W = decoder.weight.detach()
    covariance = W @ W.T + C * torch.eye(5, dtype=torch.float64)
    return torch.distributions.MultivariateNormal(decoder.bias.detach(), covariance)


def _elbo(decoder, x, mean, factor):
    """In closed form: E_q|x - Wz - b|^2 = |x - f(mean)|^2 + |W L|_F^2."""
    W = decoder.weight.detach()
    error = (x - decoder(mean)).square().sum(1) + (W @ factor).square().sum((1, 2))
    q = torch.distributions.MultivariateNormal(mean, scale_tril=factor)
    prior = torch.distributions.MultivariateNormal(torch.zeros_like(mean), torch.eye(M).double())
    kl = torch.distributions.kl_divergence(q, prior)
    return (-2.5 * math.log(2 * math.pi * C) - error / (2 * C) - kl).detach(), kl


@pytest.mark.parametrize("draws", ["iid", "antithetic"])
def test_sampled_elbo(draws):
    decoder, x, mean, factor = _problem()
    found = evaluate.sampled_elbo(
        *(decoder, x, mean, factor),
        noise_var=C,
        samples=40_000,
        draws=draws,
        generator=torch.Generator().manual_seed(1),
    )
    elbo, kl = _elbo(decoder, x, mean, factor)
    torch.testing.assert_close(found.kl, kl)
    assert ((found.elbo - elbo).abs() / found.standard_error).max() < 4
    assert found.standard_error.max() < 0.2


@pytest.mark.parametrize("proposal", evaluate.PROPOSALS)
def test_log_marginal_likelihood(proposal):
    decoder, x, mean, factor = _problem()
    found = evaluate.log_marginal_likelihood(
        *(decoder, x, mean, factor),
        noise_var=C,
        samples=20_000,
        proposal=proposal,
        generator=torch.Generator().manual_seed(1),
    )
    exact = _model(decoder).log_prob(x)
    # Where all weights are equal there is no spread to judge by.
    assert ((found.estimate - exact).abs() <= 5 * found.standard_error + 1e-9).all()


def test_every_weight_at_the_exact_posterior_is_the_evidence():
    decoder, x, _, _ = _problem()
    W = decoder.weight.detach()
    covariance = torch.linalg.inv(torch.eye(M).double() + W.T @ W / C)
    mean = ((x - decoder.bias) @ W / C @ covariance).detach()
    factor = torch.linalg.cholesky(covariance).expand(N, M, M)
    found = evaluate.log_marginal_likelihood(
        decoder, x, mean, factor, noise_var=C, samples=7, proposal="posterior"
    )
    torch.testing.assert_close(found.estimate, _model(decoder).log_prob(x))
    assert (found.effective_samples - 7).abs().max() < 1e-9


def test_a_diagonal_factor_is_its_log_variance():
    decoder, x, mean, factor = _problem()
    std = factor.diagonal(dim1=-2, dim2=-1)
    for estimate in (
        lambda q: evaluate.sampled_elbo(decoder, x, mean, q, noise_var=C, samples=8).elbo,
        lambda q: (
            evaluate.log_marginal_likelihood(decoder, x, mean, q, noise_var=C, samples=8).estimate
        ),
        lambda q: evaluate.objective_gap(decoder, x, mean, q, noise_var=C).objective,
        lambda q: evaluate.posterior_collapse(mean, q).kl,
    ):
        torch.manual_seed(2)
        of_factor = estimate(torch.diag_embed(std))
        torch.manual_seed(2)
        torch.testing.assert_close(of_factor, estimate(2 * std.log()))


def test_collapse_is_that_of_the_marginals():
    mean = torch.zeros(4, M)
    # The first latent alone is standard normal; the second is not.
    factor = torch.tensor([[1.0, 0.0], [0.3, 0.2]]).expand(4, M, M)
    found = evaluate.posterior_collapse(mean, factor)
    assert found.collapsed == 1 and found.informative_images.tolist() == [0, 4]
    expected = 0.5 * (0.13 - 1 - math.log(0.13))
    torch.testing.assert_close(found.kl, torch.tensor([0.0, expected], dtype=torch.float64))
