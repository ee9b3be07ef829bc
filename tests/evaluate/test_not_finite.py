"""Decoders that are constant, or not finite, on some images: the others' numbers stay."""

import math

import pytest
import torch
from torch import nn

from fastsfvae import evaluate
from fastsfvae.objectives.iwae import ImportanceWeighted

F64 = torch.float64
C = 0.5


class Beyond(nn.Module):
    """A smooth decoder whose outputs are `value` where z_1 is larger than `edge`."""

    def __init__(self, edge, value, m=2, n=5):
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(nn.Linear(m, 8), nn.Tanh(), nn.Linear(8, n)).double()
        self.layers.requires_grad_(False)
        self.edge, self.value = edge, value

    def forward(self, z):
        return torch.where(z[:, :1] > self.edge, self.value, self.layers(z))


def _problem(value, edge=1.0):
    """Images of which no draw, some draws, all draws and again some go beyond the edge."""
    decoder = Beyond(edge, value)
    torch.manual_seed(1)
    mean = torch.tensor([[-9.0, 0.0], [0.5, 0.3], [9.0, 0.0], [0.0, -0.2]], dtype=F64)
    return decoder, torch.randn(4, 5, dtype=F64), mean, torch.zeros_like(mean)


def _generator():
    return torch.Generator().manual_seed(1)


def _log_ml(problem, proposal="posterior", chunk_size=None, samples=6):
    return evaluate.log_marginal_likelihood(
        *problem,
        noise_var=C,
        samples=samples,
        proposal=proposal,
        generator=_generator(),
        chunk_size=chunk_size,
    )


@pytest.mark.parametrize("proposal", evaluate.PROPOSALS)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_draws_that_decode_to_infinity_have_no_weight(proposal, value):
    problem = _problem(value)
    found = _log_ml(problem, proposal)
    assert found.estimate[[0, 1, 3]].isfinite().all()
    assert found.estimate[2] == -math.inf
    assert found.effective_samples[2] == 0 and found.standard_error[2].isnan()
    assert found.standard_error[[0, 1, 3]].isfinite().all()
    for chunk_size in (1, 2, 3, 4, 6, 12, 1000):
        other = _log_ml(problem, proposal, chunk_size)
        torch.testing.assert_close(other.estimate, found.estimate, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            other.effective_samples, found.effective_samples, rtol=1e-9, atol=0
        )
        torch.testing.assert_close(
            other.standard_error, found.standard_error, rtol=1e-6, atol=1e-7, equal_nan=True
        )


@pytest.mark.parametrize("value", [math.inf, 1e200])
def test_the_weights_that_are_left_are_averaged_over_all_draws(value):
    # The square of 1e200 is infinite.
    decoder, x, mean, log_var = _problem(value)
    calls = []

    def recorded(z):
        calls.append(z)
        return decoder(z)

    found = _log_ml((recorded, x, mean, log_var), samples=12)
    z = torch.cat(calls).unflatten(0, (4, 12))
    within = z[..., 0] <= 1
    assert within[0].all() and not within[2].any() and 0 < within[1].sum() < 12
    error = (decoder.layers(z) - x.unsqueeze(1)).square().sum(-1)
    log_weight = -error / (2 * C) - 0.5 * z.square().sum(-1)
    log_weight += 0.5 * (z - mean.unsqueeze(1)).square().sum(-1)
    weight = torch.where(within, log_weight.exp(), 0)
    expected = weight.mean(1).log() + found.constant
    torch.testing.assert_close(found.estimate, expected, rtol=1e-12, atol=1e-12)
    some = [0, 1, 3]
    effective = weight.sum(1).square() / weight.square().sum(1)
    torch.testing.assert_close(found.effective_samples[some], effective[some])


@pytest.mark.parametrize("proposal", evaluate.PROPOSALS)
def test_a_nan_is_no_weight_of_zero(proposal):
    problem = _problem(math.nan, edge=5.0)
    for chunk_size in (None, 1, 4):
        found = _log_ml(problem, proposal, chunk_size)
        assert found.estimate.isnan().tolist() == [False, False, True, False]
        assert found.standard_error.isnan().tolist() == [False, False, True, False]
    good = _log_ml(_problem(0.0, edge=5.0), proposal)
    assert torch.equal(good.estimate[[0, 1, 3]], _log_ml(problem, proposal).estimate[[0, 1, 3]])


def test_proposals_whose_mean_is_not_finite_draw_from_the_posterior():
    # Means beyond the edge, of which some draws return: infinite f and no J there.
    decoder, x, mean, log_var = _problem(math.inf, edge=0.0)
    mean = 0 * mean + 0.3
    expected = _log_ml((decoder, x, mean, log_var), samples=40_000)
    assert expected.effective_samples.min() > 50
    for proposal in ("linearized", "defensive", "laplace"):
        found = _log_ml((decoder, x, mean, log_var), proposal, samples=40_000)
        error = (found.standard_error.square() + expected.standard_error.square()).sqrt()
        assert ((found.estimate - expected.estimate).abs() < 5 * error).all()
        assert found.effective_samples.min() > 50


def test_elbo_and_gap_where_draws_are_infinite():
    problem = _problem(math.inf)
    found = evaluate.sampled_elbo(*problem, noise_var=C, samples=12, generator=_generator())
    assert found.elbo[0].isfinite() and found.standard_error[0].isfinite()
    assert (found.elbo[1:3] == -math.inf).all() and (found.squared_error[1:3] == math.inf).all()
    assert found.standard_error[1:3].isnan().all()
    gap = evaluate.objective_gap(*problem, noise_var=C, samples=12, generator=_generator())
    assert torch.equal(gap.elbo, found.elbo)
    assert gap.gap[0].isfinite() and gap.gap[1] == math.inf


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_conditioning_of_one_broken_image(value):
    class Broken(nn.Module):
        def forward(self, z):
            # J is as large as z: infinite or NaN with it.
            return torch.stack([z[:, 0].square(), z[:, 1]], 1)

    mean = torch.tensor([[1.0, 0.0], [value, 0.0], [2.0, 0.0]], dtype=F64)
    found = evaluate.conditioning(Broken(), mean, torch.zeros_like(mean), noise_var=1.0)
    assert found.log10_ratio[1].isnan()
    expected = torch.tensor([5.0, 17.0], dtype=F64).log10()
    torch.testing.assert_close(found.log10_ratio[[0, 2]], expected, rtol=1e-12, atol=0)


def test_an_error_of_what_does_not_vary():
    decoder = nn.Linear(2, 3).double()
    nn.init.zeros_(decoder.weight)
    x, mean = torch.randn(4, 3, dtype=F64), torch.randn(4, 2, dtype=F64)
    settings = {"noise_var": C, "samples": (1, 3), "likelihood": "expected"}
    found = evaluate.gradient_error(decoder, x, mean, mean, repeats=3, **settings)
    # Nothing depends on the draws: no variance, not even a negative one, and no bias.
    assert max(found.loss_variance) < 1e-20 and min(found.loss_variance) >= 0
    assert min(found.gradient_variance) >= 0
    broken = evaluate.gradient_error(decoder, x / 0, mean, mean, repeats=3, **settings)
    assert math.isnan(broken.loss_bias) and math.isnan(broken.equal_loss_samples)
    assert math.isnan(broken.equal_gradient_samples)


class Parts(nn.Module):
    """Constant where z_1 < 0, in float32 with a bias that rounds; `value` where z_1 > 50."""

    def __init__(self, value=0.0):
        super().__init__()
        torch.manual_seed(3)
        self.layer, self.value = nn.Linear(2, 6).requires_grad_(False), value

    def forward(self, z):
        output = self.layer(z * (z[:, :1] >= 0)) + 0.1 * z.square().sum(1, True) * (z[:, :1] >= 0)
        return torch.where(z[:, :1] > 50, self.value, output)


def _quality(decoder, mean):
    log_var = torch.full_like(mean, -4.0)
    return evaluate.taylor_quality(
        *(decoder, mean, log_var), samples=(5, 9), reference_samples=400, generator=_generator()
    )


def test_images_of_constant_outputs_have_no_correlation():
    varying, constant = [[3.0, 0.2], [4.0, 1.0]], [[-5.0, 0.1]]
    alone = _quality(Parts(), torch.tensor(varying))
    assert alone.taylor.per_image_correlation > 0.9 and alone.taylor.uncorrelated_images == 0
    mixed = _quality(Parts(), torch.tensor(varying + constant + constant))
    for found, expected in zip(
        (mixed.taylor, *mixed.sampling.values()),
        (alone.taylor, *alone.sampling.values()),
        strict=True,
    ):
        # The same draws: what comes behind does not change them.
        assert found.per_image_correlation == pytest.approx(
            expected.per_image_correlation, rel=1e-12
        )
        assert found.uncorrelated_images == 2
        assert found.variance_ratio == pytest.approx(expected.variance_ratio, rel=1e-9)
        assert found.covariance_error_se > 0
    assert mixed.broken_images == 0
    none = _quality(Parts(), torch.tensor(constant))
    assert none.taylor.uncorrelated_images == 1
    assert math.isnan(none.taylor.per_image_correlation)
    assert math.isnan(none.taylor.pooled_correlation)
    # All outputs vary alike: there is no correlation of equal numbers either.
    alike = _quality(lambda z: z[:, :1].expand(-1, 6) * 1.7, torch.tensor(varying))
    assert alike.taylor.uncorrelated_images == 2
    assert alike.taylor.variance_ratio == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_broken_images_are_left_out_of_all_numbers_and_counted(value):
    good, broken = [[3.0, 0.2], [4.0, 1.0]], [[90.0, 0.0]]
    expected = _quality(Parts(value), torch.tensor(good))
    found = _quality(Parts(value), torch.tensor(good + broken))
    assert (found.broken_images, expected.broken_images) == (1, 0)
    assert found._replace(broken_images=0) == expected
    nothing = _quality(Parts(value), torch.tensor(broken))
    assert nothing.broken_images == 1 and math.isnan(nothing.taylor.covariance_error)
    assert math.isnan(nothing.equivalent_samples)


def test_means_say_what_they_cannot_know():
    values = torch.tensor([1.0, -math.inf])
    found = evaluate.mean_over_images(values)
    assert found.mean == -math.inf and math.isnan(found.standard_error)
    for function in (evaluate.mean_over_images, evaluate.monte_carlo_error):
        with pytest.raises(ValueError, match=r"has shape \(0,\): give \[N\]"):
            function(torch.empty(0))


def test_an_infinite_draw_leaves_the_importance_weighted_loss_finite():
    x = torch.zeros(3, 5, dtype=F64)
    mean, log_var = torch.zeros(3, 2, dtype=F64), torch.zeros(3, 2, dtype=F64)

    def loss(edge):
        objective = ImportanceWeighted(Beyond(edge, math.inf), noise_var=C, samples=8)
        return objective(x, mean, log_var, generator=_generator())

    some, none = loss(0.5), loss(-99.0)
    assert some.log_likelihood.isinf().any() and some.objective.isfinite().all()
    assert (none.objective == -math.inf).all() and none.loss == math.inf
