"""Bounds by draws that know of each other: the hierarchical one's, and reweighted EM's."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from fastsfvae.likelihoods import gaussian_kl
from fastsfvae.objectives import (
    Coupling,
    HierarchicalImportanceWeighted,
    ImportanceWeighted,
    ReweightedExpectationMaximization,
    Sampling,
)
from tests.objectives.plain import (
    B,
    C,
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

# --- hierarchical importance weighting


def _log_weights(decoder, coupling, x, mean, log_var, noise):
    """Log p(x, z_k) r(z_0|z_k) / (q(z_k|z_0) q(z_0)) ``[K, B]``, an image and a draw at a time."""
    samples, m = coupling.samples, mean.shape[1]
    rows = []
    for k in range(samples):
        row = []
        for mu, a, x_i, first, own in zip(mean, log_var, x, noise[0], noise[1 + k], strict=True):
            given = coupling.draws(torch.cat([first, mu, a]))[2 * m * k : 2 * m * (k + 1)]
            q = Normal(given[:m], given[m:].exp())
            e = given[:m] + given[m:].exp() * own
            which = torch.zeros(samples, dtype=mean.dtype)
            which[k] = 1
            back = coupling.reverse(torch.cat([e, mu, a, which]))
            r = Normal(back[:m], back[m:].exp())
            z = mu + (0.5 * a).exp() * e
            # The density of z_k is e_k's, over the deviation.
            log_q = q.log_prob(e) - 0.5 * a + standard(first).log_prob(first)
            log_p = standard(z).log_prob(z) + r.log_prob(first)
            row.append(log_density(decoder, x_i, z) + (log_p - log_q).sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("samples", [1, 3])
def test_hierarchical_bound_from_its_formula(samples):
    encoder, decoder, x = model()
    coupling = fill(Coupling(M, samples), 0.1, seed=3)
    objective = HierarchicalImportanceWeighted(decoder, coupling, noise_var=C)
    mean, log_var = encoder(x)
    noise = objective.noise(mean, torch.Generator().manual_seed(5))
    assert torch.equal(noise, normal(5, 1 + samples, B, M))
    terms = objective.at_noise(x, mean, log_var, noise)
    log_weight = _log_weights(decoder, coupling, x, mean, log_var, noise)
    value = log_weight.exp().mean(0).log()
    close(terms.objective, value.detach(), 256)
    close(terms.kl, gaussian_kl(mean, log_var).detach())
    same_gradients(terms.loss, -value.mean(), encoder, decoder, coupling, scale=1000)


def test_as_it_is_made_the_draws_are_independent():
    encoder, decoder, x = model()
    coupling = Coupling(M, K).double()
    settings = {"noise_var": C}
    objective = HierarchicalImportanceWeighted(decoder, coupling, **settings)
    noise, posterior = normal(5, 1 + K, B, M), encoder(x)
    terms = objective.at_noise(x, *posterior, noise)
    plain = ImportanceWeighted(decoder, samples=K, **settings)
    expected = plain.at_noise(x, *posterior, noise[1:])
    for one, other in zip(terms, expected, strict=True):
        close(one.detach(), other.detach())
    # The bound is the same function of the decoder, not yet of what the encoder tells the coupling.
    same_gradients(terms.loss, expected.loss, decoder, encoder)
    of_last = torch.autograd.grad(terms.loss, coupling.draws[-1].weight)[0]
    assert of_last.abs().max() > 1e-4


# --- a linear decoder, whose log p(x) is known

RUNS = 4000


def _linear(orthogonal=False):
    decoder = fill(nn.Linear(M, N), 0.6, seed=1)
    W, b = decoder.weight.data, decoder.bias.data
    if orthogonal:
        W.copy_(torch.linalg.qr(W).Q * torch.tensor([1.5, 0.7, 0.4]))
    x = b + normal(2, 1, M) @ W.T + math.sqrt(C) * normal(3, 1, N)
    evidence = MultivariateNormal(b, W @ W.T + C * torch.eye(N).double()).log_prob(x)
    precision = torch.eye(M).double() + W.T @ W / C
    mean = torch.linalg.solve(precision, W.T @ (x - b).T / C).T
    return decoder, x, evidence, mean, -precision.diagonal().log().unsqueeze(0)


def _repeat(objective, x, mean, log_var, seed, runs=RUNS):
    rows = (t.expand(runs, -1) for t in (x, mean, log_var))
    with torch.no_grad():
        return objective(*rows, generator=torch.Generator().manual_seed(seed)).objective


def _ratio(difference):
    """The mean over its standard error."""
    return float(difference.mean() / (difference.std() / math.sqrt(len(difference))))


def test_bounds_of_a_poor_posterior_keep_their_order():
    decoder, x, evidence, mean, log_var = _linear()
    poor = mean + 0.5, log_var + 0.5
    values = [_repeat(Sampling(decoder, noise_var=C), x, *poor, seed=0)]
    for samples in (2, 5, 20):
        objective = ImportanceWeighted(decoder, noise_var=C, samples=samples)
        values.append(_repeat(objective, x, *poor, seed=samples))
    values.append(evidence.expand(RUNS))
    for lower, upper in zip(values, values[1:], strict=False):
        assert _ratio(upper - lower) > 3


@pytest.mark.parametrize("samples", [2, 5, 20])
def test_matched_moments_tighten_the_bound_of_a_poor_posterior(samples):
    # No theorem, but so of this q, whose mean is off: near the posterior few draws' moments are the
    # worse proposal.
    decoder, x, evidence, mean, log_var = _linear()
    poor = mean + 1.0, log_var
    settings = {"noise_var": C, "samples": samples}
    plain, first, second = (
        _repeat(make, x, *poor, seed=samples)
        for make in (
            ImportanceWeighted(decoder, **settings),
            ReweightedExpectationMaximization(decoder, version=1, **settings),
            ReweightedExpectationMaximization(decoder, version=2, **settings),
        )
    )
    assert _ratio(second - plain) > 3 and _ratio(evidence - second) > 3
    # Version 1 has the plain bound, of the first half of the noise.
    close(first, plain)


def test_of_the_posterior_itself_every_draw_gives_log_p_of_x():
    decoder, x, evidence, mean, log_var = _linear(orthogonal=True)
    for objective in (
        ImportanceWeighted(decoder, noise_var=C, samples=K),
        HierarchicalImportanceWeighted(decoder, Coupling(M, K).double(), noise_var=C),
    ):
        close(_repeat(objective, x, mean, log_var, seed=1, runs=50), evidence.expand(50))


@pytest.mark.parametrize("samples", [1, 4])
def test_coupled_weights_have_the_mean_p_of_x(samples):
    decoder, x, evidence, mean, log_var = _linear()
    coupling = fill(Coupling(M, samples), 0.07, seed=3)
    objective = HierarchicalImportanceWeighted(decoder, coupling, noise_var=C)
    found = _repeat(objective, x, mean + 0.1, log_var + 0.4, seed=1)
    assert _ratio(evidence - found) > 3
    assert abs(_ratio((found - evidence).exp() - 1)) < 4
    # The coupling is felt.
    plain = ImportanceWeighted(decoder, noise_var=C, samples=samples)
    assert abs(_ratio(found - _repeat(plain, x, mean + 0.1, log_var + 0.4, seed=1))) > 3


# --- reweighted expectation maximisation


class _Recording(nn.Module):
    """A decoder that keeps what it decodes."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder, self.seen = decoder, []

    def forward(self, z):
        self.seen.append(z)
        return self.decoder(z)


def _moments(decoder, x, mean, log_var, z):
    """The weights' mean of draws z ``[K, B, m]``, and the covariance of q about it."""
    log_q = posterior(mean, log_var).log_prob(z).sum(-1)
    log_p = log_density(decoder, x, z) + standard(z).log_prob(z).sum(-1)
    weight = (log_p - log_q).softmax(0)
    loc = (weight.unsqueeze(-1) * z).sum(0)
    off = loc - mean
    return loc, torch.diag_embed(log_var.exp()) + off.unsqueeze(-1) * off.unsqueeze(-2)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("version", [1, 2])
def test_rem_from_its_formula(version, samples):
    encoder, decoder, x = model()
    recording = _Recording(decoder)
    settings = {"noise_var": C, "samples": samples, "version": version}
    objective = ReweightedExpectationMaximization(recording, **settings)
    mean, log_var = encoder(x)
    noise = objective.noise(mean, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    options = {"dtype": torch.float64, "generator": generator}
    two = [torch.randn(samples, B, M, **options) for _ in range(2)]
    assert torch.equal(noise, torch.stack(two))
    terms = objective.at_noise(x, mean, log_var, noise)
    of_q, of_r = (z.unflatten(0, (samples, B)) for z in recording.seen)
    assert not of_q.requires_grad and not of_r.requires_grad

    fixed = mean.detach(), log_var.detach()
    close(of_q, fixed[0] + (0.5 * fixed[1]).exp() * noise[0])
    r = MultivariateNormal(*(t.detach() for t in _moments(decoder, x, *fixed, of_q)))
    log_r = r.log_prob(of_r)
    joint_q, joint_r = (
        log_density(decoder, x, z) + standard(z).log_prob(z).sum(-1) for z in (of_q, of_r)
    )
    a = (joint_q - posterior(*fixed).log_prob(of_q).sum(-1)).detach()
    b = (joint_r - log_r).detach()
    close(terms.objective, (a if version == 1 else b).exp().mean(0).log(), 256)
    log_q = posterior(mean, log_var).log_prob(of_r).sum(-1)
    encoders = -(b.softmax(0) * log_q).sum(0).mean()
    decoders = a.softmax(0) * joint_q if version == 1 else b.softmax(0) * joint_r
    same_gradients(terms.loss, encoders - decoders.sum(0).mean(), encoder, decoder, scale=1000)
    same_gradients(terms.loss, encoders, encoder, scale=1000)


def test_the_matched_proposals_draws_have_its_moments():
    encoder, decoder, x = model()
    recording, count = _Recording(decoder), 20_000
    mean, log_var = (t[:1].detach() for t in encoder(x))
    settings = {"noise_var": C, "samples": count}
    objective = ReweightedExpectationMaximization(recording, **settings)
    with torch.no_grad():
        objective(x[:1], mean, log_var, generator=torch.Generator().manual_seed(5))
        of_q, of_r = (z.unsqueeze(1) for z in recording.seen)
        loc, covariance = _moments(decoder, x[:1], mean, log_var, of_q)
    # The direction counts, and the whitened draws are standard normal.
    assert (covariance - torch.diag_embed(log_var.exp())).abs().max() > 0.05
    factor = torch.linalg.cholesky(covariance)
    e = torch.linalg.solve(factor[0], (of_r[:, 0] - loc[0]).T)
    assert e.mean(1).abs().max() < 4 / math.sqrt(count)
    off = e @ e.T / count - torch.eye(M).double()
    assert off.abs().max() < 4 * math.sqrt(2 / count)


def test_rem_has_two_versions():
    with pytest.raises(ValueError, match="version=3 must be 1 or 2"):
        ReweightedExpectationMaximization(nn.Linear(M, N), version=3)


# --- half precision


@pytest.mark.parametrize("name", ["h-iwae", "rem-1", "rem-2", "linearized"])
def test_bounds_in_half_precision_are_float32s(name):
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(M, 6), nn.Tanh(), nn.Linear(6, N))
    x = torch.randn(50, N)
    posterior = tuple((0.3 * torch.randn(2, 50, M)).bfloat16())
    coupling = fill(Coupling(M, K), 0.1).float()
    settings = {"samples": K}
    objective = {
        "h-iwae": HierarchicalImportanceWeighted(decoder, coupling),
        "rem-1": ReweightedExpectationMaximization(decoder, version=1, **settings),
        "rem-2": ReweightedExpectationMaximization(decoder, version=2, **settings),
        "linearized": ImportanceWeighted(decoder, proposal="linearized", **settings),
    }[name]
    gradients, terms = [], []
    for enabled in (True, False):
        given = posterior if enabled else tuple(t.float() for t in posterior)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = objective(x, *given, generator=torch.Generator().manual_seed(1))
        terms.append(found)
        gradients.append(torch.autograd.grad(found.loss, tuple(decoder.parameters())))
    assert {term.dtype for term in terms[0]} == {torch.float32}
    torch.testing.assert_close(terms[0].kl, terms[1].kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms[0].objective, terms[1].objective, rtol=0, atol=0.15)
    # What is decoded without a graph leaves the weights theirs.
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() < 0.1 * other.norm()
