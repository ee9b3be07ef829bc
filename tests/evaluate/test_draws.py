"""Noise of an image's own, kinds of draws, and modes that a proposal does not know."""

import math

import pytest
import torch
from torch import nn

from fastsfvae import evaluate
from fastsfvae.evaluate._decode import NoiseStream

F64 = torch.float64


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Folded(nn.Module):
    """z -> (2 |z_1|, z_1^2, the others): two modes, at z_1 and -z_1."""

    def forward(self, z):
        return torch.cat([2 * z[:, :1].abs(), z[:, :1].square(), z[:, 1:]], 1)


def _exact(decoder, x, c, ticks):
    """log p(x) by quadrature over latents of one or two dimensions."""
    m = x.shape[1] - 1
    z = torch.cartesian_prod(*[ticks] * m).reshape(-1, m)
    log_joint = -(decoder(z) - x).square().sum(1) / (2 * c) - 0.5 * z.square().sum(1)
    constant = -0.5 * m * math.log(2 * math.pi) - 0.5 * x.shape[1] * math.log(2 * math.pi * c)
    return float(log_joint.logsumexp(0) + m * torch.log(ticks[1] - ticks[0]) + constant)


@pytest.mark.parametrize("proposal", ["defensive", "laplace"])
@pytest.mark.parametrize(
    ("x", "at", "samples"),
    [
        ([2.4, 1.3], [1.2], 200_000),
        # Further out the prior has fewer draws of the other mode.
        ([4.0, 4.0], [2.0], 400_000),
        ([2.0, 1.0, 0.4], [1.0, 0.4], 200_000),
    ],
)
def test_a_lost_mode_is_found_by_the_prior(proposal, x, at, samples):
    x, mean = torch.tensor([x], dtype=F64), torch.tensor([at], dtype=F64)
    decoder, c, log_var = Folded(), 0.05, torch.full_like(mean, -2)
    exact = _exact(decoder, x, c, torch.linspace(-6, 6, 1501, dtype=F64))

    def estimate(proposal):
        return evaluate.log_marginal_likelihood(
            *(decoder, x, mean, log_var),
            noise_var=c,
            samples=samples,
            proposal=proposal,
            generator=_generator(),
        )

    found = estimate(proposal)
    assert found.effective_samples > 30
    # Half of p(x) lies in each mode: without one of them the error is log 2.
    assert abs(float(found.estimate) - exact) < 5 * float(found.standard_error) < 0.6
    # What knows one mode alone is wrong, and sure of it.
    lost = estimate("linearized")
    assert float(lost.estimate) == pytest.approx(exact - math.log(2), abs=0.05)


def test_the_estimated_bias_is_that_of_repeated_estimates():
    torch.manual_seed(0)
    decoder, c, repeats = nn.Linear(1, 2).double().requires_grad_(False), 0.1, 4000
    x = torch.randn(1, 2, dtype=F64).expand(repeats, 2)
    zeros = torch.zeros(repeats, 1, dtype=F64)

    def estimate(samples):
        return evaluate.log_marginal_likelihood(
            *(decoder, x, zeros, zeros),
            noise_var=c,
            samples=samples,
            proposal="posterior",
            generator=_generator(),
        )

    covariance = decoder.weight @ decoder.weight.T + c * torch.eye(2, dtype=F64)
    normal = torch.distributions.MultivariateNormal(decoder.bias, covariance)
    exact = float(normal.log_prob(x[0]))
    found = estimate(100)
    bias = float(found.estimate.mean()) - exact
    error = float(found.estimate.std()) / math.sqrt(repeats)
    assert bias < -5 * error
    assert float(found.bias.mean()) == pytest.approx(bias, rel=0.1, abs=5 * error)


def _problem(images=40, m=3, n=5, decoder=None):
    torch.manual_seed(9)
    decoder = decoder or nn.Sequential(nn.Linear(m, 6), nn.Tanh(), nn.Linear(6, n)).double()
    x, mean = torch.randn(images, n, dtype=F64), torch.randn(images, m, dtype=F64)
    return decoder, x, mean, 0.3 * torch.randn(images, m, dtype=F64)


@pytest.mark.parametrize("samples", [1, 7, 1500])
@pytest.mark.parametrize(
    "estimator",
    [
        evaluate.log_marginal_likelihood,
        evaluate.sampled_elbo,
        evaluate.objective_gap,
    ],
)
def test_an_image_has_its_noise_whatever_else_is_evaluated(estimator, samples):
    problem = _problem(images=7 if samples > 100 else 40)
    decoder, *data = problem

    def found(part, **options):
        of_part = (t[part] for t in data)
        return estimator(
            *(decoder, *of_part), noise_var=0.4, samples=samples, generator=_generator(), **options
        )

    whole = found(slice(None))
    for part in (slice(0, 3), slice(3, 5), slice(5, None)):
        for chunk_size in (None, 2, 50):
            if samples * 40 // (chunk_size or 50) > 1500:
                continue
            of_part = found(part, first_image=part.start, chunk_size=chunk_size)
            for a, b in zip(of_part, whole, strict=True):
                expected = b[part] if b.dim() else b
                torch.testing.assert_close(a, expected, rtol=1e-6, atol=1e-9, equal_nan=True)


def test_streams_are_independent():
    noise = NoiseStream(500, 2, torch.zeros(0, dtype=F64), _generator())
    rows = torch.stack([noise.start(i).take(500) for i in range(60)]).flatten(1)
    correlation = torch.corrcoef(rows).fill_diagonal_(0)
    # 1770 pairs, each N(0, 1 / 1000).
    assert correlation.abs().max() < 5 / math.sqrt(1000)
    assert abs(float(rows.mean())) < 5 / math.sqrt(rows.numel())
    assert float(rows.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / rows.numel()))


@pytest.mark.parametrize(
    ("draws", "samples"), [("iid", 12), ("antithetic", 12), ("orthogonal", 12), ("orthogonal", 6)]
)
def test_the_error_of_dependent_draws_is_that_of_repeated_estimates(draws, samples):
    # One image, again and again: each has its own noise.
    decoder, x, mean, log_var = _problem(images=1)
    problem = (decoder, *(t.expand(4000, -1) for t in (x, mean, log_var)))

    def elbo(draws, chunk_size=None):
        return evaluate.sampled_elbo(
            *problem,
            noise_var=0.4,
            samples=samples,
            draws=draws,
            generator=_generator(),
            chunk_size=chunk_size,
        )

    found, plain = elbo(draws), elbo("iid")
    spread = float(found.elbo.std())
    pooled = math.hypot(spread, float(plain.elbo.std())) / math.sqrt(4000)
    if draws != "iid":
        assert abs(float(found.elbo.mean() - plain.elbo.mean())) < 4 * pooled
    if samples == 6:
        # All six are one block: nothing is known of its spread.
        assert found.standard_error.isnan().all()
    else:
        stated = float(found.standard_error.square().mean().sqrt())
        assert stated == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("draws", ["antithetic", "orthogonal"])
def test_dependent_draws_vary_less_on_a_linear_decoder(draws):
    problem = _problem(images=300, decoder=nn.Linear(3, 5).double().requires_grad_(False))

    def errors(draws):
        found = [
            evaluate.sampled_elbo(
                *problem, noise_var=0.4, samples=12, draws=draws, generator=_generator(seed)
            ).elbo
            for seed in range(20)
        ]
        return float(torch.stack(found).var(0).mean())

    # The part of the squared error that is linear in the noise cancels.
    assert errors(draws) < 0.7 * errors("iid")


@pytest.mark.parametrize("draws", ["antithetic", "orthogonal"])
def test_blocks_do_not_depend_on_the_size_of_a_pass(draws):
    problem = _problem()
    expected, *others = (
        evaluate.sampled_elbo(
            *problem,
            noise_var=0.4,
            samples=12,
            draws=draws,
            generator=_generator(),
            chunk_size=chunk_size,
        )
        for chunk_size in (None, 1, 5, 12, 31)
    )
    for other in others:
        torch.testing.assert_close(other.elbo, expected.elbo, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.standard_error, expected.standard_error, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": "pairs"}, "draws='pairs' is not one of 'iid', 'antithetic', 'orthogonal'"),
        ({"draws": "antithetic", "samples": 3}, "samples=3: they come in pairs"),
        ({"draws": "orthogonal", "samples": 5}, "samples=5: they come in pairs"),
        ({"draws": "orthogonal", "samples": 8}, "give a multiple of 6, or an even number below"),
        ({"draws": "antithetic", "samples": 0}, "samples=0 must be at least 1"),
    ],
)
def test_draws_that_there_are_not(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        evaluate.sampled_elbo(*_problem(), noise_var=0.4, **options)
    assert "\n" not in str(caught.value)


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return 2 * z

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@pytest.mark.parametrize("proposal", [None, "linearized", "laplace"])
def test_a_decoder_without_a_jacobian_is_told_the_way_out(proposal):
    _, _, mean, log_var = _problem()
    options = {"noise_var": 0.4, "samples": 3} | ({"proposal": proposal} if proposal else {})

    def decoder(z):
        return Opaque.apply(z)

    with pytest.raises(RuntimeError, match='proposal="posterior" needs no Jacobian') as caught:
        evaluate.log_marginal_likelihood(decoder, mean, mean, log_var, **options)
    assert "\n" not in str(caught.value)
    options["proposal"] = "posterior"
    assert (
        evaluate.log_marginal_likelihood(decoder, mean, mean, log_var, **options)[0]
        .isfinite()
        .all()
    )
