"""The importance-weighted bound with the linearised decoder's posterior as its proposal."""

import math

import pytest
import torch
from torch import nn

from fastsfvae.objectives.iwae import ImportanceWeighted
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.methods import METHODS

B, M, N, C = 5, 3, 7, 0.3


@pytest.fixture
def given():
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    mean = torch.randn(B, M, **double).requires_grad_()
    log_var = (0.3 * torch.randn(B, M, **double) - 1).requires_grad_()
    return torch.randn(B, N, **double), mean, log_var


def _mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(M, 6), nn.Tanh(), nn.Linear(6, N)).double()


def _bound(decoder, samples, **settings):
    return ImportanceWeighted(
        decoder, noise_var=C, samples=samples, proposal="linearized", **settings
    )


def _generator(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("samples, draws", [(1, "iid"), (4, "iid"), (4, "antithetic")])
def test_a_linear_decoder_gives_log_p_of_x(given, samples, draws):
    torch.manual_seed(1)
    decoder = nn.Linear(M, N).double()
    x, mean, log_var = given
    W, b = decoder.weight.detach(), decoder.bias.detach()
    cov = W @ W.T + C * torch.eye(N, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(b, cov).log_prob(x)
    terms = _bound(decoder, samples, draws=draws)(x, mean, log_var, generator=_generator())
    torch.testing.assert_close(terms.objective, exact, rtol=1e-11, atol=1e-11)
    # Any q will do; that of K = 1 by the posterior is off by nats.
    plain = ImportanceWeighted(decoder, noise_var=C, samples=samples)
    assert (plain(x, mean, log_var, generator=_generator()).objective - exact).abs().max() > 0.1


def _proposal(decoder, x, mean):
    """By reverse mode and plain solves, an image at a time."""
    locs, covs = [], []
    for image, a in zip(x, mean.detach(), strict=True):
        J = torch.autograd.functional.jacobian(decoder, a)
        cov = torch.linalg.inv(torch.eye(M, dtype=a.dtype) + J.T @ J / C)
        locs.append(a + cov @ (J.T @ (image - decoder(a)) / C - a))
        covs.append(cov)
    return torch.distributions.MultivariateNormal(
        torch.stack(locs).detach(), torch.stack(covs).detach()
    )


def test_gradients_are_those_of_the_plain_formula(given):
    x, mean, log_var = given
    decoder, samples = _mlp(), 4
    bound = _bound(decoder, samples)
    noise = bound.noise(mean, _generator())
    bound.at_noise(x, mean, log_var, noise).loss.backward()
    found = [p.grad.clone() for p in (*decoder.parameters(), mean, log_var)]
    for parameter in (*decoder.parameters(), mean, log_var):
        parameter.grad = None

    proposal = _proposal(decoder, x, mean)
    z = proposal.loc + (proposal.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    log_p = torch.distributions.Normal(decoder(z), math.sqrt(C)).log_prob(x).sum(-1)
    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    weights = log_p + log_prior - proposal.log_prob(z)
    q = torch.distributions.MultivariateNormal(mean, torch.diag_embed(log_var.exp()))
    kl = torch.distributions.kl_divergence(q, proposal)
    (kl - weights.logsumexp(0) + math.log(samples)).mean().backward()
    for one, parameter in zip(found, (*decoder.parameters(), mean, log_var), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-9, atol=1e-10)


def test_it_is_a_lower_bound_in_expectation(given):
    """Of a curved decoder with one latent, whose log p(x) a fine grid gives."""
    torch.manual_seed(2)
    decoder = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, N)).double()
    x = given[0]
    grid = torch.linspace(-9, 9, 4001, dtype=torch.float64).unsqueeze(-1)
    error = (decoder(grid) - x[:, None]).square().sum(-1)
    log_joint = -0.5 * (N * math.log(2 * math.pi * C) + error / C)
    log_joint = log_joint - 0.5 * (math.log(2 * math.pi) + grid[:, 0].square())
    exact = (log_joint.logsumexp(-1) + math.log(18 / 4000)).detach()
    runs = 4000
    mean = torch.zeros(B * runs, 1, dtype=torch.float64)
    gaps = []
    for samples in (1, 8):
        bound = _bound(decoder, samples)
        rows = x.repeat_interleave(runs, 0)
        values = bound(rows, mean, mean - 1, generator=_generator()).objective.view(B, runs)
        spread = values.std(1) / math.sqrt(runs)
        gap = exact - values.mean(1)
        assert (gap > -4 * spread).all()
        gaps.append(gap.mean())
    # It tightens with K, and is no equality here.
    assert gaps[0] > 2 * gaps[1] > 0


@pytest.mark.parametrize("method", [name for name in METHODS if name != "iwae"])
def test_other_methods_refuse_it(method):
    settings = {"kl_weight": 4.0} if method == "beta-vae" else {}
    reason = "passes no gradient" if method == "dreg" else "--proposal is for iwae"
    with pytest.raises(ValueError, match=reason):
        TrainConfig(method=method, proposal="linearized", **settings)


@pytest.mark.parametrize("mode", ["compile", "cuda_graph"])
def test_it_is_not_captured(mode):
    with pytest.raises(ValueError, match="is not captured: leave out"):
        TrainConfig(method="iwae", proposal="linearized", **{mode: True})
