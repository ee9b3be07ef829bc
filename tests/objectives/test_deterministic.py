"""Auto-encoders that draw no latents, each against its formula written out in float64."""

import math

import mpmath
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from fastsfvae.objectives import (
    CramerWoldAutoEncoder,
    NoiseVariance,
    RegularizedAutoEncoder,
    SlicedWassersteinAutoEncoder,
    WassersteinAutoEncoder,
    spectrally_normalized,
)
from fastsfvae.objectives.cwae import _sliced_kernel, cramer_wold
from fastsfvae.objectives.swae import sliced_wasserstein
from fastsfvae.objectives.wae import maximum_mean_discrepancy
from tests.objectives.plain import close

B, M, N, C = 6, 3, 5, 0.3
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def _normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _model(m=M):
    generator = torch.Generator().manual_seed(0)
    encoder = nn.Linear(N, 2 * m).double()
    decoder = nn.Sequential(nn.Linear(m, 8), nn.Tanh(), nn.Linear(8, N)).double()
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return encoder, decoder, NoiseVariance(C).double()


def _log_likelihood(output, x, noise_var):
    return Normal(output, (0.5 * noise_var.log).exp()).log_prob(x).sum(-1)


def _check(terms, value, log_likelihood, posterior, parameters, scale=64):
    """Every term, and the gradient of every parameter, are those of a value ``[B]``."""
    mean, log_var = posterior
    kl = kl_divergence(
        Normal(mean, (0.5 * log_var).exp()), Normal(torch.zeros_like(mean), 1.0)
    ).sum(-1)
    close(terms.objective, value.detach(), scale)
    close(terms.loss.detach(), -value.mean().detach(), scale)
    close(terms.log_likelihood, log_likelihood.detach(), scale)
    close(terms.kl, kl.detach())
    assert not any(term.requires_grad for term in terms[1:])
    found = torch.autograd.grad(terms.loss, parameters, retain_graph=True)
    expected = torch.autograd.grad(-value.mean(), parameters)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        close(one, other, scale)


# --- regularised auto-encoder


@pytest.mark.parametrize("regularizer", ["l2", "gradient-penalty"])
def test_rae_from_its_formula(regularizer):
    encoder, decoder, noise_var = _model()
    x = _normal(1, B, N)
    mean, log_var = encoder(x).chunk(2, dim=1)
    objective = RegularizedAutoEncoder(
        decoder, weight=0.7, regularizer=regularizer, regularizer_weight=0.2, noise_var=noise_var
    )
    terms = objective(x, mean, log_var)

    log_likelihood = _log_likelihood(decoder(mean), x, noise_var)
    values = []
    for i in range(B):
        if regularizer == "l2":
            penalty = sum((p**2).sum() for p in decoder.parameters())
        else:
            J = torch.autograd.functional.jacobian(decoder, mean[i], create_graph=True)
            penalty = 0.5 * torch.linalg.matrix_norm(J) ** 2
        values.append(log_likelihood[i] - 0.7 * mean[i].dot(mean[i]) / 2 - 0.2 * penalty)
    close(terms.squared_error, (decoder(mean) - x).square().sum(-1).detach())
    parameters = (*encoder.parameters(), *decoder.parameters(), noise_var.log)
    _check(terms, torch.stack(values), log_likelihood, (mean, log_var), parameters)


def test_rae_of_a_spectrally_normalised_decoder():
    encoder, decoder, noise_var = _model()
    assert spectrally_normalized(decoder) is decoder
    x = _normal(1, B, N)
    mean, log_var = encoder(x).chunk(2, dim=1)
    # Until the power iterations have converged.
    for _ in range(200):
        decoder(mean.detach())
    decoder.eval()
    objective = RegularizedAutoEncoder(
        decoder,
        weight=0.7,
        regularizer="spectral-norm",
        regularizer_weight=0.2,
        noise_var=noise_var,
    )
    terms = objective(x, mean, log_var)

    originals = [decoder[i].parametrizations.weight.original for i in (0, 2)]
    first, second = (w / torch.linalg.matrix_norm(w, 2) for w in originals)
    output = torch.tanh(mean @ first.T + decoder[0].bias) @ second.T + decoder[2].bias
    log_likelihood = _log_likelihood(output, x, noise_var)
    value = log_likelihood - 0.7 * mean.square().sum(-1) / 2
    parameters = (*encoder.parameters(), *originals, noise_var.log)
    _check(terms, value, log_likelihood, (mean, log_var), parameters, scale=1e4)


def test_a_transposed_convolution_is_normalised_by_its_outputs():
    layer = nn.ConvTranspose2d(3, 2, 4).double()
    decoder = spectrally_normalized(nn.Sequential(layer))
    z = _normal(1, 1, 3, 2, 2)
    for _ in range(300):
        decoder(z)
    matrix = layer.weight.detach().movedim(1, 0).flatten(1)
    close(torch.linalg.svdvals(matrix)[0], torch.ones((), dtype=torch.float64), 1e4)


def test_rae_refuses_what_it_cannot_regularise():
    _, decoder, _ = _model()
    settings = {"weight": 1.0, "regularizer_weight": 1.0}
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        spectrally_normalized(nn.Sequential(nn.Tanh()))
    with pytest.raises(ValueError, match="not normalised"):
        RegularizedAutoEncoder(decoder, regularizer="spectral-norm", **settings)
    with pytest.raises(ValueError, match="regularizer='l3'"):
        RegularizedAutoEncoder(decoder, regularizer="l3", **settings)
    for name in settings:
        with pytest.raises(ValueError, match=f"{name}=-1"):
            RegularizedAutoEncoder(decoder, **{**settings, name: -1})


# --- maximum mean discrepancy


def _mmd(z, prior):
    n, m = z.shape

    def kernel(a, b):
        widths = [2 * m * scale for scale in SCALES]
        return sum(w / (w + (a - b).dot(a - b)) for w in widths)

    total = 0.0
    for i in range(n):
        for j in range(n):
            total = total - 2 * kernel(z[i], prior[j]) / n**2
            if i != j:
                pair = kernel(z[i], z[j]) + kernel(prior[i], prior[j])
                total = total + pair / (n * (n - 1))
    return total


def test_wae_from_its_formula():
    encoder, decoder, noise_var = _model()
    x = _normal(1, B, N)
    mean, log_var = encoder(x).chunk(2, dim=1)
    objective = WassersteinAutoEncoder(decoder, weight=3.0, noise_var=noise_var)
    terms = objective(x, mean, log_var, generator=torch.Generator().manual_seed(5))
    log_likelihood = _log_likelihood(decoder(mean), x, noise_var)
    value = log_likelihood - 3.0 * _mmd(mean, _normal(5, B, M))
    parameters = (*encoder.parameters(), *decoder.parameters(), noise_var.log)
    _check(terms, value, log_likelihood, (mean, log_var), parameters)


def test_discrepancy_is_the_loop_over_pairs():
    z, prior = 2 * _normal(1, 9, M) + 1, _normal(2, 9, M)
    close(maximum_mean_discrepancy(z, prior), _mmd(z, prior))
    assert torch.autograd.gradcheck(maximum_mean_discrepancy, (z.requires_grad_(), prior))


def test_discrepancy_of_one_law_is_zero_on_average():
    runs, n = 400, 20
    z, prior = _normal(1, runs, n, M), _normal(2, runs, n, M)
    ratios = []
    for shift in (0.0, 0.5):
        pairs = zip(z + shift, prior, strict=True)
        found = torch.stack([maximum_mean_discrepancy(*pair) for pair in pairs])
        ratios.append(float(found.mean() / (found.std() / math.sqrt(runs))))
        # The estimate is of either sign where there is nothing to find.
        assert shift or (found.min() < 0 < found.max())
    assert abs(ratios[0]) < 3 and ratios[1] > 15


@pytest.mark.parametrize("shapes", [((1, 2), (1, 2)), ((4, 2), (5, 2)), ((4,), (4,))])
def test_discrepancy_takes_pairs(shapes):
    with pytest.raises(ValueError, match="n >= 2"):
        maximum_mean_discrepancy(*(torch.zeros(shape) for shape in shapes))


# --- sliced Wasserstein


def _sliced(z, prior, directions):
    total = 0.0
    for d in directions:
        unit = d / d.norm()
        ours, theirs = (
            sorted((row.dot(unit) for row in sample), key=lambda t: t.item())
            for sample in (z, prior)
        )
        total = total + sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / len(z)
    return total / len(directions)


def test_swae_from_its_formula():
    encoder, decoder, noise_var = _model()
    x = _normal(1, B, N)
    mean, log_var = encoder(x).chunk(2, dim=1)
    settings = {"projections": 4, "weight": 3.0, "noise_var": noise_var}
    objective = SlicedWassersteinAutoEncoder(decoder, **settings)
    terms = objective(x, mean, log_var, generator=torch.Generator().manual_seed(5))
    rows = _normal(5, B + 4, M)
    log_likelihood = _log_likelihood(decoder(mean), x, noise_var)
    value = log_likelihood - 3.0 * _sliced(mean, rows[:B], rows[B:])
    parameters = (*encoder.parameters(), *decoder.parameters(), noise_var.log)
    _check(terms, value, log_likelihood, (mean, log_var), parameters)
    with pytest.raises(ValueError, match="projections=0"):
        SlicedWassersteinAutoEncoder(decoder, weight=1.0, projections=0)


def test_sliced_distance_knows_no_order_and_sees_a_shift():
    z, directions = _normal(1, 9, M), _normal(2, 7, M)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    assert sliced_wasserstein(z, z[order], directions) < 1e-30
    line, both_ways = _normal(4, 9, 1), _normal(5, 7, 1)
    assert both_ways.min() < 0 < both_ways.max()
    found = sliced_wasserstein(line[order[:9]] + 0.7, line, both_ways)
    close(found, torch.tensor(0.49, dtype=torch.float64))
    arguments = z.requires_grad_(), _normal(6, 9, M), directions
    assert torch.autograd.gradcheck(sliced_wasserstein, arguments)
    for wrong in (z[:8], z[:, :2]):
        with pytest.raises(ValueError, match=r"must be \[n, m\]"):
            sliced_wasserstein(wrong, z, directions)


def _order_statistics(n):
    """Means of n sorted normal numbers, by the trapezoidal rule."""
    t = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    below, above = torch.special.ndtr(t), torch.special.ndtr(-t)
    density = t * torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)
    each = [n * math.comb(n - 1, i) * below**i * above ** (n - 1 - i) * density for i in range(n)]
    return torch.trapezoid(torch.stack(each), t)


@pytest.mark.parametrize("m", [1, 3])
def test_sliced_distance_of_one_law_is_the_spread_of_order_statistics(m):
    runs, n = 600, 10
    z, prior, directions = (_normal(s, runs, r, m) for s, r in ((1, n), (2, n), (3, 5)))
    triples = zip(z, prior, directions, strict=True)
    found = torch.stack([sliced_wasserstein(*triple) for triple in triples])
    expected = 2 * (1 - _order_statistics(n).square().mean())
    error = found.std() / math.sqrt(runs)
    assert abs(found.mean() - expected) < 3 * error and expected > 20 * error


# --- Cramer-Wold


def _paper(z):
    """Knop et al. 2020: the squared distance by its approximation for D >= 3, term by term."""
    n, D = z.shape
    g = (4 / (3 * n)) ** (2 / 5)
    total = (1 + g) ** -0.5
    for a in z:
        total = total - 2 / n * (g + 0.5 + a.dot(a) / (2 * D - 3)) ** -0.5
        for b in z:
            total = total + (g + (a - b).dot(a - b) / (2 * D - 3)) ** -0.5 / n**2
    return total / (2 * math.sqrt(math.pi))


@pytest.mark.parametrize("m", [3, 16])
def test_cramer_wold_is_the_papers(m):
    z = 1.5 * _normal(1, 9, m) + 0.5
    close(cramer_wold(z) / _paper(z), torch.ones((), dtype=torch.float64), 4000)
    assert torch.autograd.gradcheck(cramer_wold, z[:4].clone().requires_grad_())


@pytest.mark.parametrize("m", [1, 2])
def test_cramer_wold_in_one_and_two_dimensions_is_exact(m):
    z = 1.5 * _normal(1, 7, m) + 0.5
    n = len(z)
    with mpmath.workdps(30):
        g = (mpmath.mpf(4) / (3 * n)) ** (mpmath.mpf(2) / 5)
        points = [[mpmath.mpf(v) for v in row] for row in z.tolist()]

        def density(a, b, variance):
            """Of the slices of N(a - b, variance I) at 0, averaged over all lines."""
            squared = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
            phi = mpmath.hyp1f1(0.5, mpmath.mpf(m) / 2, -squared / (2 * variance))
            return phi / mpmath.sqrt(2 * mpmath.pi * variance)

        origin = [mpmath.mpf(0)] * m
        exact = density(origin, origin, 2 + 2 * g)
        exact += sum(density(a, b, 2 * g) for a in points for b in points) / n**2
        exact -= 2 * sum(density(a, origin, 1 + 2 * g) for a in points) / n
        assert abs(float(cramer_wold(z)) / exact - 1) < 1e-12
    assert torch.autograd.gradcheck(cramer_wold, z.clone().requires_grad_())


def test_cramer_wold_of_a_line_is_the_smoothed_densities_distance():
    z = 1.5 * _normal(1, 7, 1) + 0.5
    g = (4 / (3 * len(z))) ** 0.4
    t = torch.linspace(-20, 20, 20_001, dtype=torch.float64)
    ours = Normal(z, math.sqrt(g)).log_prob(t).exp().mean(0)
    prior = Normal(torch.zeros_like(t), math.sqrt(1 + g)).log_prob(t).exp()
    close(cramer_wold(z), torch.trapezoid((ours - prior) ** 2, t), 4)


@pytest.mark.parametrize("m, stated", [(3, 0.092), (4, 0.057), (8, 0.022), (16, 0.0098)])
def test_approximation_of_the_sliced_kernel_errs_by_what_is_stated(m, stated):
    s = torch.logspace(-2, 3, 101, dtype=torch.float64)
    # Of a variance of 1 a distance is twice its s.
    found = _sliced_kernel(2 * s, 1.0, m).tolist()
    exact = [float(mpmath.hyp1f1(0.5, m / 2, -v)) for v in s.tolist()]
    largest = max(abs(a - b) for a, b in zip(found, exact, strict=True))
    assert abs(largest / stated - 1) < 0.02


# Where phi is approximated, draws of the prior itself are off by what that leaves.
@pytest.mark.parametrize("m, share", [(1, 0.01), (2, 0.01), (3, 0.5), (16, 0.15)])
def test_cramer_wold_tells_the_prior_from_its_shift(m, share):
    z = _normal(1, 1000, m)
    assert 0 < cramer_wold(z) < share * cramer_wold(z + 1)


def test_cramer_wold_takes_a_sample():
    for shape in ((3,), (0, 2), (2, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"must be \[n, m\]"):
            cramer_wold(torch.zeros(shape))


@pytest.mark.parametrize("m", [2, 3])
def test_cwae_from_its_formula(m):
    encoder, decoder, noise_var = _model(m)
    x = _normal(1, B, N)
    mean, log_var = encoder(x).chunk(2, dim=1)
    terms = CramerWoldAutoEncoder(decoder, weight=3.0, noise_var=noise_var)(x, mean, log_var)
    log_likelihood = _log_likelihood(decoder(mean), x, noise_var)
    # In two dimensions the function itself is held against another above.
    distance = _paper(mean) if m == 3 else cramer_wold(mean)
    value = log_likelihood - 3.0 * distance.log()
    parameters = (*encoder.parameters(), *decoder.parameters(), noise_var.log)
    # The logarithm is of a difference.
    _check(terms, value, log_likelihood, (mean, log_var), parameters, scale=1000)


# --- all of them


def _rae(regularizer):
    def make(decoder):
        settings = {"weight": 0.1, "regularizer_weight": 0.1}
        return RegularizedAutoEncoder(decoder, regularizer=regularizer, **settings)

    return make


@pytest.mark.parametrize(
    "make",
    [
        _rae("l2"),
        _rae("gradient-penalty"),
        lambda decoder: WassersteinAutoEncoder(decoder, weight=10.0),
        lambda decoder: SlicedWassersteinAutoEncoder(decoder, weight=10.0),
        CramerWoldAutoEncoder,
    ],
    ids=["l2", "gradient-penalty", "wae", "swae", "cwae"],
)
def test_penalties_in_half_precision_are_float32s(make):
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6))
    mean, log_var = (0.5 * torch.randn(2, 50, 4)).bfloat16()
    x = torch.randn(50, 6)
    objective = make(decoder)
    draw = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(x, mean, log_var, generator=draw())
    found.loss.backward()
    assert decoder[0].weight.grad.abs().max() > 0
    exact = objective(x, mean.float(), log_var.float(), generator=draw())
    assert {term.dtype for term in found} == {torch.float32}
    torch.testing.assert_close(found.kl, exact.kl)
    torch.testing.assert_close(found.objective, exact.objective, rtol=0, atol=0.15)
    # Eight bits are the decoder's alone, and its Jacobian's.
    penalty = found.log_likelihood - found.objective
    of_jacobian = getattr(objective, "regularizer", None) == "gradient-penalty"
    rtol, atol = (2e-2, 1e-3) if of_jacobian else (1e-5, 5e-6)
    expected = exact.log_likelihood - exact.objective
    torch.testing.assert_close(penalty, expected, rtol=rtol, atol=atol)
