"""The linear VAE against probabilistic PCA in closed form."""

import math

import pytest
import torch
from torch import nn

from fastsfvae.objectives import SamplingFree

IMAGES, N, M = 200, 6, 2
NOISE_VAR = 0.4


def _data():
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(N, N, dtype=torch.float64, generator=generator) / 2
    return torch.randn(IMAGES, N, dtype=torch.float64, generator=generator) @ mix + 0.5


def _pca(x, noise_var=None):
    """The maximum-likelihood W W^T, c and mean log-likelihood; c is learned where it is None."""
    covariance = torch.cov(x.T, correction=0)
    values, vectors = torch.linalg.eigh(covariance)
    c = values[:-M].mean().item() if noise_var is None else noise_var
    top = vectors[:, -M:]
    product = top @ torch.diag((values[-M:] - c).clamp_min(0)) @ top.T
    model = product + c * torch.eye(N, dtype=torch.float64)
    gaussian = torch.distributions.MultivariateNormal(x.mean(0), model)
    return product, c, gaussian.log_prob(x).mean()


class _LinearVae:
    """x -> N(Vx + a, diag(h)) and z -> Wz + b in float64, trained to convergence by L-BFGS."""

    def __init__(self, likelihood, noise_var=None):
        generator = torch.Generator().manual_seed(6)
        self.encoder = nn.Linear(N, M).double()
        self.decoder = nn.Linear(M, N).double()
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            nn.init.normal_(parameter, std=0.3, generator=generator)
        self.log_var = torch.zeros(M, dtype=torch.float64, requires_grad=True)
        start = 1.0 if noise_var is None else noise_var
        self.log_c = torch.tensor(math.log(start), dtype=torch.float64)
        self.log_c.requires_grad_(noise_var is None)
        self.objective = SamplingFree(self.decoder, likelihood=likelihood)

    def parameters(self):
        modules = (*self.encoder.parameters(), *self.decoder.parameters())
        return [*modules, self.log_var] + [self.log_c] * self.log_c.requires_grad

    def terms(self, x):
        self.objective.loss.noise_var = self.log_c.exp()
        return self.objective(x, self.encoder(x), self.log_var.expand(len(x), M))

    def fit(self, x):
        optimizer = torch.optim.LBFGS(
            self.parameters(),
            max_iter=400,
            tolerance_grad=1e-10,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def loss():
            optimizer.zero_grad()
            value = self.terms(x).loss
            value.backward()
            return value

        optimizer.step(loss)
        return self

    @property
    def product(self):
        return (self.decoder.weight @ self.decoder.weight.T).detach()


@pytest.mark.parametrize("noise_var", [NOISE_VAR, None], ids=["fixed", "learned"])
def test_expected_reaches_probabilistic_pca(noise_var):
    x = _data()
    product, c, log_likelihood = _pca(x, noise_var)
    model = _LinearVae("expected", noise_var).fit(x)
    # The optimum is flat: an error d in W costs d^2 nats.
    assert (model.product - product).norm() < 1e-5 * product.norm()
    assert model.log_c.exp().item() == pytest.approx(c, rel=1e-5)
    assert model.terms(x).objective.mean().item() == pytest.approx(log_likelihood.item(), abs=1e-9)
    torch.testing.assert_close(model.decoder(model.encoder(x)).mean(0), x.mean(0))


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["precision", "mixture", "normalized"])
def test_the_other_likelihoods_end_elsewhere(likelihood):
    x = _data()
    product, _, log_likelihood = _pca(x, NOISE_VAR)
    model = _LinearVae(likelihood, NOISE_VAR).fit(x)
    assert (model.product - product).norm() > 0.05 * product.norm()
    # What they maximise is no bound: it exceeds the likelihood's maximum.
    assert model.terms(x).objective.mean() > log_likelihood + 0.01
