import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal

from fastsfvae import evaluate


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _problem(seed: int = 0, images: int = 7, m: int = 3, n: int = 11):
    """A smooth decoder, data and a posterior, in float64."""
    torch.manual_seed(seed)
    decoder = nn.Sequential(nn.Linear(m, 8), nn.Tanh(), nn.Linear(8, n)).double()
    x = torch.randn(images, n, dtype=torch.float64)
    return decoder, x, torch.randn(images, m).double(), torch.randn(images, m).double()


class _Recorder:
    """A decoder that keeps what it was called with."""

    def __init__(self, decoder):
        self.decoder, self.calls = decoder, []

    def __call__(self, z):
        self.calls.append(z)
        return self.decoder(z)


def _orthogonal_linear(noise_var: float, m: int = 3, n: int = 6):
    """A linear decoder whose exact posterior is diagonal, data, and that posterior."""
    torch.manual_seed(3)
    basis = torch.linalg.qr(torch.randn(n, m, dtype=torch.float64)).Q
    weight, bias = basis * torch.tensor([2.0, 0.7, 0.1]).double(), torch.randn(n).double()
    x = bias + torch.randn(5, m).double() @ weight.T + 0.3 * torch.randn(5, n).double()
    precision = 1 + weight.square().sum(0) / noise_var
    mean = (x - bias) @ weight / noise_var / precision
    log_var = -precision.log().expand_as(mean)
    covariance = weight @ weight.T + noise_var * torch.eye(n, dtype=torch.float64)
    exact = MultivariateNormal(bias, covariance).log_prob(x)
    return lambda z: z @ weight.T + bias, x, mean, log_var, exact


@pytest.mark.parametrize("noise_var", [0.5, 0.01])
def test_log_ml_of_a_linear_decoder_is_exact_under_its_posterior(noise_var):
    decoder, x, mean, log_var, exact = _orthogonal_linear(noise_var)
    result = evaluate.log_marginal_likelihood(
        *(decoder, x, mean, log_var),
        samples=9,
        noise_var=noise_var,
        proposal="posterior",
        generator=_generator(),
    )
    # Every weight equals p(x): no spread, all samples effective.
    torch.testing.assert_close(result.estimate, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.effective_samples, torch.full_like(exact, 9.0))
    assert result.standard_error.max() < 1e-6
    elbo = evaluate.sampled_elbo(
        decoder, x, mean, log_var, noise_var=noise_var, samples=4000, generator=_generator()
    )
    # The ELBO of the exact posterior is log p(x) too; here with Monte Carlo error.
    assert ((elbo.elbo - exact).abs() < 5 * elbo.standard_error).all()


def test_log_ml_agrees_with_quadrature_on_a_grid():
    decoder, x, _, _ = _problem(m=2)
    c, ticks = 0.3, torch.linspace(-8, 8, 801, dtype=torch.float64)
    z = torch.cartesian_prod(ticks, ticks)
    with torch.no_grad():
        output = decoder(z)
    errors = torch.cdist(x, output).square()
    log_joint = -errors / (2 * c) - 0.5 * z.square().sum(-1) - math.log(2 * math.pi)
    log_joint -= 0.5 * x.shape[1] * math.log(2 * math.pi * c)
    exact = log_joint.logsumexp(-1) + 2 * torch.log(ticks[1] - ticks[0])
    # The prior as proposal: wide enough for any image.
    zeros = torch.zeros(len(x), 2, dtype=torch.float64)
    result = evaluate.log_marginal_likelihood(
        *(decoder, x, zeros, zeros),
        samples=40_000,
        noise_var=c,
        proposal="posterior",
        generator=_generator(),
    )
    assert (result.effective_samples > 50).all()
    assert ((result.estimate - exact).abs() < 5 * result.standard_error).all()
    assert result.standard_error.max() < 0.1


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 20])
@pytest.mark.parametrize("samples", [1, 6])
def test_estimates_equal_plain_formulas_on_the_same_draws(chunk_size, samples):
    decoder, x, mean, log_var = _problem()
    c, options = 0.4, {"samples": samples, "chunk_size": chunk_size}
    prior = Independent(Normal(torch.zeros_like(mean), 1.0), 1)
    posterior = Independent(Normal(mean, (0.5 * log_var).exp()), 1)

    def draws(calls):
        """The recorded latents as [K, N, m]: one image's draws follow another's."""
        return torch.cat(calls).unflatten(0, (len(x), samples)).transpose(0, 1)

    def log_likelihood(z):
        return Independent(Normal(decoder(z), math.sqrt(c)), 1).log_prob(x)

    recorder = _Recorder(decoder)
    result = evaluate.log_marginal_likelihood(
        *(recorder, x, mean, log_var),
        noise_var=c,
        proposal="posterior",
        generator=_generator(),
        **options,
    )
    assert max(map(len, recorder.calls)) <= (chunk_size or 10**6)
    z = draws(recorder.calls)
    assert z.shape == (samples, *mean.shape)
    log_weight = log_likelihood(z) + prior.log_prob(z) - posterior.log_prob(z)
    weight = log_weight.exp()
    expected = log_weight.logsumexp(0) - math.log(samples)
    torch.testing.assert_close(result.estimate, expected, rtol=1e-12, atol=1e-11)
    effective = weight.sum(0).square() / weight.square().sum(0)
    torch.testing.assert_close(result.effective_samples, effective, rtol=1e-9, atol=0)

    recorder = _Recorder(decoder)
    elbo = evaluate.sampled_elbo(
        recorder, x, mean, log_var, noise_var=c, generator=_generator(), **options
    )
    z = draws(recorder.calls)
    kl = torch.distributions.kl_divergence(posterior, prior)
    per_draw = log_likelihood(z)
    torch.testing.assert_close(elbo.kl, kl, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(elbo.log_likelihood, per_draw.mean(0), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(elbo.elbo, per_draw.mean(0) - kl, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(
        elbo.squared_error, (decoder(z) - x).square().sum(-1).mean(0), rtol=1e-12, atol=0
    )
    if samples == 1:
        assert result.standard_error.isnan().all() and result.bias.isnan().all()
        assert elbo.standard_error.isnan().all()
    else:
        error = weight.std(0) / (math.sqrt(samples) * weight.mean(0))
        torch.testing.assert_close(result.standard_error, error, rtol=1e-6, atol=1e-9)
        bias = -(1 / effective - 1 / samples) / 2
        torch.testing.assert_close(result.bias, bias, rtol=1e-6, atol=1e-9)
        spread = per_draw.std(0) / math.sqrt(samples)
        torch.testing.assert_close(elbo.standard_error, spread, rtol=1e-6, atol=1e-9)


def test_squared_error_at_mean():
    decoder, x, mean, _ = _problem()
    expected = (x - decoder(mean)).square().sum(-1)
    for chunk_size in (None, 1, 3):
        error = evaluate.squared_error_at_mean(decoder, x, mean, chunk_size=chunk_size)
        torch.testing.assert_close(error, expected, rtol=1e-12, atol=0)


def test_one_broken_image_leaves_the_others():
    decoder, x, mean, log_var = _problem()
    options = {"noise_var": 0.5, "samples": 4}
    broken = x.clone()
    broken[2, 0] = math.nan
    for function in (evaluate.log_marginal_likelihood, evaluate.sampled_elbo):
        good = function(decoder, x, mean, log_var, generator=_generator(), **options)
        bad = function(decoder, broken, mean, log_var, generator=_generator(), **options)
        assert bad[0][2].isnan()
        keep = torch.arange(len(x)) != 2
        assert torch.equal(bad[0][keep], good[0][keep])


def test_tensor_noise_variance():
    decoder, x, mean, log_var = _problem()
    for function in (evaluate.log_marginal_likelihood, evaluate.sampled_elbo):
        number, tensor = (
            function(decoder, x, mean, log_var, samples=3, noise_var=c, generator=_generator())
            for c in (0.3, torch.tensor(0.3, dtype=torch.float64, requires_grad=True))
        )
        for a, b in zip(number, tensor, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
            assert not b.requires_grad


@pytest.mark.parametrize(
    ("images", "delta", "allowed"),
    [(100, 0.29, 29), (300, 0.01, 3), (99, 0.01, 0), (1000, 0.057, 57), (10, 1, 10), (10, 0, 0)],
)
def test_collapse_is_counted_in_integers(images, delta, allowed):
    # Dimension i has exactly i informative images, at epsilon to the last bit.
    epsilon, m = 0.02, min(images, allowed + 2) + 1
    mean = torch.zeros(images, m, dtype=torch.float64)
    for i in range(m):
        mean[:i, i] = math.sqrt(2 * epsilon) * (1 + 1e-9)
        mean[i:, i] = math.sqrt(2 * epsilon) * (1 - 1e-9)
    result = evaluate.posterior_collapse(mean, torch.zeros_like(mean), epsilon, delta)
    assert result.informative_images.tolist() == list(range(m))
    assert result.collapsed == min(allowed + 1, m)
    assert result.latent_dim == m
    kl = torch.full((m,), epsilon, dtype=torch.float64)
    torch.testing.assert_close(result.kl, kl, rtol=1e-8, atol=0)


def test_active_units_and_broken_dimensions():
    mean = torch.zeros(4, 3, dtype=torch.float64)
    # Variances 0.0101, 0.0099 and NaN.
    mean[:, 0] = torch.tensor([1, -1, 1, -1]) * math.sqrt(0.0101)
    mean[:, 1] = torch.tensor([1, -1, 1, -1]) * math.sqrt(0.0099)
    mean[:, 2] = math.nan
    result = evaluate.posterior_collapse(mean, torch.zeros_like(mean))
    assert (result.active, result.collapsed) == (1, 2)
    assert result.informative_images.tolist() == [0, 0, 4]


def test_mean_over_images():
    values = torch.tensor([1.0, 4.0, 4.0, 7.0])
    # Squared deviations 9 + 0 + 0 + 9 over 3, over 4.
    assert evaluate.mean_over_images(values) == pytest.approx((4.0, math.sqrt(1.5)))
    assert math.isnan(evaluate.mean_over_images(values[:1]).standard_error)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"samples": 0}, ValueError, "samples=0 must be at least 1"),
        ({"noise_var": 0.0}, ValueError, "noise_var=0.0 must be finite and positive"),
        ({"chunk_size": 0}, ValueError, "chunk_size=0 must be at least 1"),
        ({"proposal": "prior"}, ValueError, "proposal='prior' is not one of 'posterior'"),
        ({"x": torch.zeros(7, 11, dtype=torch.uint8)}, TypeError, "x has dtype torch.uint8"),
        ({"mean": torch.zeros(6, 3)}, ValueError, "must both be \\[B, m\\]"),
        ({"decoder": lambda z: z}, ValueError, "the decoder returned \\(7, 3\\) for 7 latents"),
        (
            {"decoder": lambda z: z, "proposal": "posterior"},
            ValueError,
            "the decoder returned \\(35, 3\\) for 35 latents",
        ),
        ({"first_image": -1}, ValueError, "first_image=-1 must not be negative"),
    ],
)
def test_bad_input(change, error, message):
    decoder, x, mean, log_var = _problem()
    arguments = {"decoder": decoder, "x": x, "mean": mean, "log_var": log_var}
    settings = {"samples": 5, "noise_var": 0.5}
    with pytest.raises(error, match=message) as caught:
        evaluate.log_marginal_likelihood(**{**arguments, **settings, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"), [((0.0, 0.01), "epsilon=0.0"), ((0.05, 1.5), "delta=1.5")]
)
def test_bad_collapse_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate.posterior_collapse(torch.zeros(2, 2), torch.zeros(2, 2), *arguments)


def test_the_package_shows_its_functions_and_what_they_return():
    kinds = {name: type(getattr(evaluate, name)) for name in dir(evaluate)}
    assert not {name for name, kind in kinds.items() if kind is type(evaluate) or name[0] == "_"}
    results = {"Conditioning", "PosteriorCollapse", "SampledElbo", "TaylorQuality", "ImageMean"}
    assert {"conditioning", "taylor_quality", *results} < kinds.keys()
