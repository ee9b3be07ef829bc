"""The variational Laplace objective: its posterior, its value and which gradient goes where."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

import fastsfvae as sf
from fastsfvae.objectives import VariationalLaplace

C, M, N, B = 0.3, 3, 7, 4


def problem(linear=False):
    torch.manual_seed(0)
    hidden = [] if linear else [nn.Linear(M, 9), nn.Tanh(), nn.Linear(9, N)]
    decoder = nn.Sequential(*(hidden or [nn.Linear(M, N)])).double()
    x = torch.randn(B, N, dtype=torch.float64)
    mean, log_var = torch.randn(2, B, M, dtype=torch.float64)
    return decoder, x, mean.requires_grad_(), (log_var - 1).requires_grad_()


def standard():
    return MultivariateNormal(torch.zeros(M).double(), torch.eye(M).double())


def close(got, want, tolerance=1e-10):
    scale = max(1.0, float(want.abs().max()))
    assert got.shape == want.shape and float((got - want).abs().max()) <= tolerance * scale


def test_of_a_linear_decoder_the_bound_is_tight():
    decoder, x, mean, log_var = problem(linear=True)
    W, bias = decoder[0].weight, decoder[0].bias
    evidence = MultivariateNormal(bias, W @ W.T + C * torch.eye(N).double()).log_prob(x)
    objective = VariationalLaplace(decoder, noise_var=C, mode_steps=1, bound="closed-form")
    # The posterior is exact, and so is the expectation.
    close(objective(x, mean, log_var).objective, evidence.detach())


def test_values_and_gradients():
    decoder, x, mean, log_var = problem()
    at = sf.fit_latents(decoder, x, mean, steps=2, prior_var=1.0, noise_var=C, tol=0.0).z
    output, J = sf.decode_with_jacobian(decoder, at, backend="reference")
    covariance = (torch.eye(M).double() + J @ J.mT / C).inverse()
    score = (J @ (x - output).unsqueeze(-1)).squeeze(-1) / C - at
    mode = at + (covariance @ score.unsqueeze(-1)).squeeze(-1)
    posterior = MultivariateNormal(mode, covariance)
    fixed = MultivariateNormal(mode.detach(), covariance.detach())
    noise = torch.randn(2, B, M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = mode + torch.einsum("bij,kbj->kbi", posterior.scale_tril, noise)
    error = (x - decoder(z.flatten(0, 1)).unflatten(0, (2, B))).square().sum(-1)
    constant = 0.5 * N * math.log(2 * math.pi * C)
    likelihood = (-error / (2 * C)).mean(0) - constant
    kl = kl_divergence(posterior, standard())
    encoded = MultivariateNormal(mean, torch.diag_embed(log_var.exp()))
    want = kl_divergence(encoded, fixed).mean() - (likelihood - kl).mean()

    objective = VariationalLaplace(decoder, noise_var=C, mode_steps=2, samples=2)
    terms = objective(x, mean, log_var, generator=torch.Generator().manual_seed(1))
    close(terms.objective, (likelihood - kl).detach())
    close(terms.kl, kl.detach())
    close(terms.squared_error, error.mean(0).detach())
    close(terms.loss, want)
    leaves = [mean, log_var, *decoder.parameters()]
    pairs = zip(*(torch.autograd.grad(v, leaves) for v in (terms.loss, want)), strict=True)
    for ours, theirs in pairs:
        close(ours, theirs)


def test_closed_form_is_the_mean_of_many_draws_to_first_order():
    decoder, x, mean, log_var = problem(linear=True)
    closed = VariationalLaplace(decoder, noise_var=C, bound="closed-form")(x, mean, log_var)
    drawn = VariationalLaplace(decoder, noise_var=C, samples=40_000)
    torch.manual_seed(0)
    close(drawn(x, mean, log_var).objective, closed.objective, 5e-3)
    with torch.no_grad():
        assert not drawn(x, mean, log_var).loss.requires_grad


def test_the_encoder_is_led_to_the_posterior():
    decoder, x, mean, _ = problem()
    fit = sf.fit_latents(decoder, x, mean, steps=50, prior_var=1.0, noise_var=C, tol=0.0)
    mode, prior = fit.z, (torch.zeros_like(mean), torch.ones_like(mean))
    for _ in range(60):
        posterior = sf.kalman_update(decoder, x, *prior, C, at=mode)
        mode = posterior.mean.detach()
    # Of all diagonal Gaussians the divergence is least at the mode and the precisions of q*.
    mean = mode.clone().requires_grad_()
    precision = posterior.cov.detach().inverse().diagonal(dim1=1, dim2=2)
    log_var = (-precision.log()).requires_grad_()
    objective = VariationalLaplace(decoder, noise_var=C)

    def gradients(mean, log_var):
        return torch.autograd.grad(objective(x, mean, log_var).loss, [mean, log_var])

    for gradient in gradients(mean, log_var):
        assert float(gradient.abs().max()) < 1e-10
    of_mean, of_log_var = gradients(mean + 1e-3, log_var + 1e-3)
    assert float((of_mean * 1e-3).sum(1).min()) > 0 and float(of_log_var.min()) > 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode_steps": 0}, "mode_steps=0 must be at least 1"),
        ({"samples": 0}, "samples=0 must be at least 1"),
        ({"bound": "tight"}, "bound='tight' is not one of"),
        ({"noise_var": -1.0}, "must be finite and positive"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        VariationalLaplace(nn.Linear(M, N), **settings)


def test_autocast_leaves_the_draws_alone():
    """A draw of q* is no layer: of a decoder without products it is the same to the bit."""
    seen = []

    class Decoder(nn.Module):
        def forward(self, z):
            seen.append(z.detach())
            return torch.cat([z, z.sin(), z[:, :1]], 1)

    x, mean, log_var = torch.randn(B, N), torch.randn(B, M), torch.zeros(B, M)
    draws = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            objective = VariationalLaplace(Decoder(), noise_var=C, samples=5)
            objective(x, mean, log_var, generator=torch.Generator().manual_seed(1))
        draws.append(seen[-1])
    assert draws[0].shape == (5 * B, M) and torch.equal(*draws)
