"""Estimators against closed forms: linear decoders, quadrature, Gaussian moments."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from fastsfvae import evaluate
from fastsfvae.evaluate import proposals
from fastsfvae.objectives.sampling import Sampling

F64 = torch.float64


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _linear(m=3, n=6, images=5, noise_var=0.3):
    """A linear decoder, data, a posterior that is nothing like the exact one, and log p(x)."""
    torch.manual_seed(4)
    decoder = nn.Linear(m, n).double().requires_grad_(False)
    x = torch.randn(images, n, dtype=F64)
    mean, log_var = 2 * torch.randn(images, m, dtype=F64), torch.randn(images, m, dtype=F64)
    covariance = decoder.weight @ decoder.weight.T + noise_var * torch.eye(n, dtype=F64)
    return decoder, x, mean, log_var, MultivariateNormal(decoder.bias, covariance).log_prob(x)


def _nonlinear(m=2, n=9, images=4):
    torch.manual_seed(5)
    decoder = nn.Sequential(nn.Linear(m, 16), nn.Tanh(), nn.Linear(16, n)).double()
    decoder = decoder.requires_grad_(False)
    x = decoder(torch.randn(images, m, dtype=F64)) + 0.3 * torch.randn(images, n, dtype=F64)
    return decoder, x, 0.3 * torch.randn(images, m, dtype=F64), torch.zeros(images, m, dtype=F64)


def test_all_linearised_weights_of_a_linear_decoder_are_equal():
    decoder, x, mean, log_var, exact = _linear()
    result = evaluate.log_marginal_likelihood(
        decoder, x, mean, log_var, noise_var=0.3, samples=20, proposal="linearized"
    )
    torch.testing.assert_close(result.estimate, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.effective_samples, torch.full_like(exact, 20.0))
    # The spread of equal weights: rounding of their float64 logarithms, |log w| eps < 1e-13.
    assert result.standard_error.max() < 1e-6


def test_all_weights_of_laplaces_gaussian_are_equal_for_a_linear_decoder():
    decoder, x, mean, _, exact = _linear()
    with torch.no_grad():
        gaussian = proposals.laplace(decoder, x, mean, 0.3)
        noise = torch.randn(5, 20, 3, generator=_generator(), dtype=F64)
        z, log_density = gaussian.draw(slice(5), noise)
    error = (x.unsqueeze(1) - decoder(z)).square().sum(-1)
    log_weight = -error / 0.6 - 0.5 * z.square().sum(-1) - log_density
    log_weight = log_weight - 0.5 * x.shape[1] * math.log(2 * math.pi * 0.3)
    # The mode is known to the root of the rounding of -log p(x, z).
    torch.testing.assert_close(log_weight, exact.unsqueeze(1).expand(5, 20), rtol=1e-7, atol=0)
    log_density_of_z = gaussian.log_density(slice(5), z)
    torch.testing.assert_close(log_density_of_z, log_density, rtol=1e-9, atol=1e-9)


def test_laplaces_gaussian_lies_at_the_mode():
    decoder, x, mean, _ = _nonlinear()
    with torch.no_grad():
        gaussian = proposals.laplace(decoder, x, mean, 0.1)
        mode = gaussian.shift(slice(4), torch.zeros(4, 1, 2, dtype=F64)).squeeze(1)
        spread = gaussian.shift(slice(4), torch.eye(2, dtype=F64).expand(4, 2, 2)) - mode[:, None]
    for i in range(4):

        def joint(z, i=i):
            return (x[i] - decoder(z)).square().sum() / 0.2 + 0.5 * z.square().sum()

        slope = torch.autograd.functional.jacobian(joint, mode[i])
        J = torch.autograd.functional.jacobian(decoder, mode[i])
        precision = torch.eye(2, dtype=F64) + J.T @ J / 0.1
        # Closer than a thousandth of the Gaussian's own width.
        assert slope @ torch.linalg.solve(precision, slope) < 1e-6
        covariance = spread[i].T @ spread[i]
        torch.testing.assert_close(covariance, torch.linalg.inv(precision), rtol=1e-10, atol=0)


@pytest.mark.parametrize("proposal", ["defensive", "laplace"])
def test_defensive_weights_never_exceed_ten_times_the_target(proposal):
    decoder, x, mean, log_var, exact = _linear()
    result = evaluate.log_marginal_likelihood(
        decoder,
        *(x, mean, log_var),
        noise_var=0.3,
        samples=20_000,
        proposal=proposal,
        generator=_generator(),
    )
    assert ((result.estimate - exact).abs() < 5 * result.standard_error).all()
    # At least 90% of the density is p(z|x): no weight is above p(x) / 0.9, so ESS >= 0.9^2 K or so.
    assert result.effective_samples.min() > 0.8 * 20_000


@pytest.mark.parametrize("proposal", evaluate.PROPOSALS)
def test_every_proposal_agrees_with_quadrature(proposal):
    decoder, x, mean, log_var = _nonlinear()
    c, ticks = 0.1, torch.linspace(-7, 7, 701, dtype=F64)
    z = torch.cartesian_prod(ticks, ticks)
    log_joint = -torch.cdist(x, decoder(z)).square() / (2 * c) - 0.5 * z.square().sum(-1)
    constant = -math.log(2 * math.pi) - 0.5 * x.shape[1] * math.log(2 * math.pi * c)
    exact = log_joint.logsumexp(-1) + 2 * torch.log(ticks[1] - ticks[0]) + constant
    result = evaluate.log_marginal_likelihood(
        decoder,
        *(x, mean, log_var),
        noise_var=c,
        samples=40_000,
        proposal=proposal,
        generator=_generator(),
    )
    trusted = result.effective_samples > 50
    assert trusted.all() or proposal == "linearized"
    assert trusted.any()
    assert ((result.estimate - exact).abs() < 5 * result.standard_error)[trusted].all()
    torch.testing.assert_close(
        result.without_constant - result.estimate,
        torch.full_like(exact, 0.5 * x.shape[1] * math.log(2 * math.pi * c)),
    )


@pytest.mark.parametrize("proposal", evaluate.PROPOSALS)
def test_draws_do_not_depend_on_the_size_of_a_pass(proposal):
    decoder, x, mean, log_var = _nonlinear(images=67)

    def estimate(chunk_size):
        return evaluate.log_marginal_likelihood(
            decoder,
            *(x, mean, log_var),
            noise_var=0.2,
            samples=7,
            proposal=proposal,
            generator=_generator(),
            chunk_size=chunk_size,
        )

    # One draw a pass, parts of an image, a batch that does not divide 67, all at once.
    expected, *others = (estimate(size) for size in (None, 1, 3, 7 * 5))
    for other in others:
        torch.testing.assert_close(other.estimate, expected.estimate, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            other.effective_samples, expected.effective_samples, rtol=1e-9, atol=0
        )


def test_the_last_incomplete_batch_counts():
    decoder, x, mean, log_var, exact = _linear(images=67)
    calls = []
    result = evaluate.log_marginal_likelihood(
        decoder,
        *(x, mean, log_var),
        noise_var=0.3,
        samples=3,
        proposal="linearized",
        chunk_size=12,
        progress=calls.append,
    )
    torch.testing.assert_close(result.estimate, exact, rtol=1e-12, atol=1e-12)
    assert sum(calls) == 67 * 3 and max(calls) <= 12


def test_objective_gap_of_a_linear_decoder():
    decoder, x, mean, log_var, _ = _linear()
    found = evaluate.objective_gap(
        decoder,
        *(x, mean, log_var),
        noise_var=0.3,
        likelihood="expected",
        samples=4000,
        generator=_generator(),
    )
    # "expected" is the ELBO itself where the decoder is linear.
    assert (found.gap.abs() < 5 * found.standard_error).all()
    above = evaluate.objective_gap(decoder, x, mean, log_var, noise_var=0.3, gamma=1.0, samples=400)
    torch.testing.assert_close(above.gap, above.objective - above.elbo)
    assert (above.gap > -5 * above.standard_error).all()


def test_taylor_quality_of_a_gaussian():
    decoder, _, mean, log_var, _ = _linear(n=8, images=3)
    found = evaluate.taylor_quality(
        decoder, mean, log_var, samples=(6, 40), reference_samples=4000, generator=_generator()
    )
    factor = decoder.weight * log_var.exp().sqrt().unsqueeze(1)
    covariance = factor @ factor.mT
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    # E |S_K - Sigma|_F^2 = (tr Sigma^2 + (tr Sigma)^2) / (K - 1) for a Gaussian.
    scale = float((covariance.square().sum((1, 2)) + trace.square()).mean())
    assert found.reference_noise == pytest.approx(scale / 3999, rel=0.8)
    # The linearisation is exact: what is left after the reference's noise is noise of that size.
    assert abs(found.taylor.covariance_error) < 5 * scale / 3999
    assert found.taylor.pooled_correlation > 0.999
    assert found.taylor.variance_ratio == pytest.approx(1, abs=5 * math.sqrt(2 / 4000))
    repeats = [
        evaluate.taylor_quality(
            decoder, mean, log_var, samples=(6,), reference_samples=300, generator=_generator(seed)
        ).sampling[6]
        for seed in range(60)
    ]
    errors = torch.tensor([agreement.covariance_error for agreement in repeats])
    spread = float(errors.std()) / math.sqrt(len(errors))
    assert float(errors.mean()) == pytest.approx(scale / 5, abs=5 * spread)
    assert spread < 0.2 * scale / 5


def test_taylor_quality_of_a_parabola():
    # a z + b z^2 has variance (a + 2 b mu)^2 h + 2 b^2 h^2; the linearisation lacks the last.
    a, b = 1.0, 0.7
    mean, log_var = torch.tensor([[0.5, -1.0, 2.0]], dtype=F64), torch.zeros(1, 3, dtype=F64)
    found = evaluate.taylor_quality(
        lambda z: a * z + b * z.square(),
        *(mean, log_var),
        samples=(50, 235),
        reference_samples=60_000,
        generator=_generator(),
    )
    missing = 2 * b**2
    linear = (a + 2 * b * mean[0]).square()
    assert found.taylor.variance_ratio == pytest.approx(
        float(linear.sum() / (linear + missing).sum()), rel=0.02
    )
    noise = 5 * math.sqrt(found.reference_noise) * 2 * math.sqrt(3) * missing
    assert found.taylor.covariance_error == pytest.approx(3 * missing**2, abs=noise)
    assert noise < 3 * missing**2
    assert found.equivalent_samples == pytest.approx(
        1 + found.reference_noise * 59_999 / found.taylor.covariance_error
    )


def test_conditioning_and_lost_samples():
    # J = diag(1, 10^-2) and h = (4, 1): lambda_max = 4.
    decoder = nn.Linear(2, 2, bias=False).requires_grad_(False)
    decoder.weight.copy_(torch.diag(torch.tensor([1.0, 0.01])))
    log_var = torch.tensor([[math.log(4.0), 0.0]])
    found = evaluate.conditioning(decoder, torch.zeros(1, 2), log_var, noise_var=0.04)
    assert float(found.log10_ratio) == pytest.approx(math.log10(101), rel=1e-6)
    assert not found.lost.any()
    # Two equal columns, 10^5 long, against c = 10^-4: eigenvalues of ratio 10^14 are lost.
    decoder.weight.copy_(torch.full((2, 2), 1e5))
    found = evaluate.conditioning(decoder, torch.zeros(1, 2), 0 * log_var, noise_var=1e-4)
    assert float(found.log10_ratio) == pytest.approx(math.log10(4e10 / 1e-4), rel=1e-6)
    assert found.lost.all()


@pytest.mark.slow
def test_gradient_error_of_a_linear_decoder():
    torch.manual_seed(6)
    decoder, c = nn.Linear(2, 4).double(), 0.5
    x, mean, log_var = (torch.randn(3, k, dtype=F64) for k in (4, 2, 2))
    settings = {"noise_var": c, "likelihood": "expected", "samples": (1, 4), "repeats": 4000}
    found = evaluate.gradient_error(decoder, x, mean, log_var, generator=_generator(), **settings)
    # The loss is (1/3) sum |r - W s e|^2 / (2c): Var |r - v|^2 = 4 r^T C r + 2 tr C^2.
    with torch.no_grad():
        r = (x - decoder(mean)).unsqueeze(-1)
        factor = decoder.weight * log_var.exp().sqrt().unsqueeze(1)
        C = factor @ factor.mT
        variance = 4 * (r.mT @ C @ r).flatten() + 2 * C.square().sum((1, 2))
        expected = float(variance.sum()) / (9 * 4 * c**2)
    # The relative error of a variance of 4000 draws is about sqrt((kurtosis - 1) / 4000) = 5%.
    assert found.loss_variance[0] == pytest.approx(expected, rel=0.25)
    assert found.loss_variance[1] == pytest.approx(expected / 4, rel=0.25)
    ratio = found.gradient_variance[0] / found.gradient_variance[1]
    assert ratio == pytest.approx(4, rel=0.25)
    # "expected" is unbiased here.
    assert abs(found.loss_bias) < 5 * math.sqrt(expected / 4000)

    # Against plain autograd: the gradient's variance of single draws.
    objective, grads = Sampling(decoder, noise_var=c), []
    generator = _generator(1)
    leaves = [t.clone().requires_grad_() for t in (mean, log_var)]
    for _ in range(4000):
        loss = objective(x, *leaves, generator=generator).loss
        grads.append(
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss, [*leaves, *decoder.parameters()])]
            )
        )
    plain = float(torch.stack(grads).var(0).sum())
    assert found.gradient_variance[0] == pytest.approx(plain, rel=0.25)


def test_frechet_distance_equals_an_eigen_decomposition():
    pytest.importorskip("torchmetrics")
    torch.manual_seed(7)
    real = torch.rand(60, 1, 2, 2, dtype=F64)
    generated = torch.rand(50, 1, 2, 2, dtype=F64) ** 2
    found = evaluate.frechet_distance(real, generated.split(17), nn.Flatten())
    moments = []
    for images in (real, generated):
        rows = images.flatten(1)
        moments.append((rows.mean(0), torch.cov(rows.T)))
    (mu1, C1), (mu2, C2) = moments
    values, vectors = torch.linalg.eigh(C1)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ C2 @ root).sqrt().sum()
    expected = (mu1 - mu2).square().sum() + C1.trace() + C2.trace() - 2 * cross
    assert found.fid == pytest.approx(float(expected), rel=1e-10)
    assert (found.real_images, found.generated_images, found.features) == (60, 50, 4)
    assert not found.comparable
    with pytest.warns(UserWarning, match="3 images for 4 features"):
        evaluate.frechet_distance(real[:3], generated, nn.Flatten())
    other = nn.Sequential(nn.Flatten(), nn.Linear(4, 2).double().requires_grad_(False))
    hashes = {evaluate.frechet_distance(real, generated, other).weights_sha256 for _ in range(2)}
    assert len(hashes) == 1
    other[1].weight.mul_(2)
    assert evaluate.frechet_distance(real, generated, other).weights_sha256 not in hashes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate.Inception("nowhere.pth"), "is not a file|missing"),
        (lambda: evaluate.frechet_distance(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2),
                                           nn.Flatten()), "1 images"),
        (lambda: evaluate.taylor_quality(nn.Identity(), torch.zeros(1, 2), torch.zeros(1, 2),
                                         samples=(1,)), "at least 2 draws"),
        (lambda: evaluate.gradient_error(nn.Identity(), *[torch.zeros(1, 2)] * 3, noise_var=1.0,
                                         repeats=1), "repeats=1"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    pytest.importorskip("torchmetrics")
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
