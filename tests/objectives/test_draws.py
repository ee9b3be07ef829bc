"""Antithetic and orthogonal draws: each alone is one of q(z|x), and together they cancel."""

import itertools
import math

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae._noise import DRAWS, standard_normal
from fastsfvae.objectives import (
    DoublyReparameterized,
    ImportanceWeighted,
    Sampling,
    StickingTheLanding,
)

NOISE_VAR, B, M, N = 0.3, 4, 3, 5
CLASSES = (Sampling, ImportanceWeighted, StickingTheLanding, DoublyReparameterized)
TAKEN = [
    (class_, draws)
    for class_, draws in itertools.product(CLASSES, DRAWS[1:])
    if (class_, draws) != (DoublyReparameterized, "orthogonal")
]


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


def _noise(*shape, draws, seed=0):
    return standard_normal(
        shape, draws, device=torch.device("cpu"), dtype=torch.float64, generator=_seeded(seed)
    )


@pytest.mark.parametrize("m", [1, 2, 6])
@pytest.mark.parametrize("draws", DRAWS)
def test_each_row_is_standard_normal(draws, m):
    count, rows = 20_000, min(4, 2 * m)
    noise = _noise(rows, count, m, draws=draws)
    assert noise.shape == (rows, count, m)
    grid = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)
    for row in noise:
        # Mean, covariance and the distribution function of each coordinate and of the radius.
        assert row.mean(0).abs().max() < 4.5 / math.sqrt(count)
        assert (row.T @ row / count - torch.eye(m)).abs().max() < 4.5 * math.sqrt(2 / count)
        below = (row[:, :, None] <= grid).double().mean(0)
        exact = torch.special.ndtr(grid)
        error = (exact * (1 - exact) / count).sqrt()
        assert ((below - exact).abs() < 4.5 * error).all()
        radius = row.square().sum(1)
        levels = torch.tensor([0.5 * m, m, 2.0 * m], dtype=torch.float64)
        chi = torch.special.gammainc(torch.full_like(levels, m / 2), levels / 2)
        found = (radius[:, None] <= levels).double().mean(0)
        assert ((found - chi).abs() < 4.5 * (chi * (1 - chi) / count).sqrt()).all()


def test_directions_are_haar_and_lengths_independent_of_them():
    # Moments of the product of two rows' entries: 0 where independent rows have 1.
    count, m = 40_000, 3
    noise = _noise(2 * m, count, m, draws="orthogonal")[:m]
    direction = noise / noise.norm(dim=-1, keepdim=True)
    inner = torch.einsum("kbi,lbi->bkl", direction, direction)
    assert (inner - torch.eye(m)).abs().max() < 1e-9
    lengths = noise.norm(dim=-1)
    for k, other in itertools.permutations(range(m), 2):
        pair = torch.stack([lengths[k], lengths[other]])
        assert torch.corrcoef(pair)[0, 1].abs() < 4.5 / math.sqrt(count)
        of_direction = torch.stack([lengths[k], direction[other, :, 0].abs()])
        assert torch.corrcoef(of_direction)[0, 1].abs() < 4.5 / math.sqrt(count)
    # Not only each direction: the determinant's sign, which QR alone would fix.
    signs = torch.linalg.det(direction.movedim(0, 1)).sign()
    assert signs.mean().abs() < 4.5 / math.sqrt(count)


def test_one_orthogonal_pair_is_an_antithetic_pair():
    pairs = [_noise(2, 50, 4, draws=draws) for draws in ("antithetic", "orthogonal")]
    torch.testing.assert_close(*pairs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("draws", DRAWS[1:])
def test_odd_terms_cancel(draws):
    noise = _noise(2 * M, B, M, draws=draws)
    for power in (1, 3, 5):
        assert noise.pow(power).sum(0).abs().max() <= 1e-12 * noise.abs().pow(power).max()
    # Of a decoder that is odd around the mean, its mean over draws is what it is there.
    mean, log_var = torch.randn(2, B, M, generator=_seeded(3)).double()
    objective = Sampling(nn.Identity(), noise_var=NOISE_VAR, samples=2 * M, draws=draws)
    x = torch.zeros(B, M, dtype=torch.float64)
    cubes = Sampling(lambda z: (z - mean.repeat(2 * M, 1)) ** 3 + 1, samples=2 * M, draws=draws)
    error = cubes(x, mean, log_var, generator=_seeded(0)).squared_error
    z = (0.5 * log_var).exp() * noise
    torch.testing.assert_close(error, (z**6).mean(0).sum(-1) + M, rtol=1e-12, atol=0)
    terms = objective(x, mean, log_var, generator=_seeded(0))
    squares = (mean.square() + z.square().mean(0)).sum(-1)
    torch.testing.assert_close(terms.squared_error, squares, rtol=1e-12, atol=0)


def test_all_orthogonal_directions_of_one_length_are_the_expectation_of_a_linear_decoder():
    torch.manual_seed(0)
    decoder = nn.Linear(M, N).double()
    mean, log_var, x = (torch.randn(B, k, dtype=torch.float64) for k in (M, M, N))
    mean.requires_grad_(), log_var.requires_grad_()
    noise = _noise(2 * M, B, M, draws="orthogonal")
    noise = noise / noise.norm(dim=-1, keepdim=True) * math.sqrt(M)
    objective = Sampling(decoder, noise_var=NOISE_VAR, samples=2 * M, draws="orthogonal")
    drawn = objective.at_noise(x, mean, log_var, noise)
    settings = {"noise_var": NOISE_VAR, "likelihood": "expected"}
    exact = sf.sampling_free_elbo(decoder, x, mean, log_var, **settings)
    torch.testing.assert_close(drawn.objective, exact.elbo, rtol=1e-12, atol=1e-12)
    wrt = (mean, log_var, *decoder.parameters())
    ours = torch.autograd.grad(drawn.loss, wrt)
    theirs = torch.autograd.grad(-exact.elbo.mean(), wrt)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def _model(m=M):
    encoder = nn.Linear(N, 2 * m).double()
    decoder = nn.Sequential(nn.Linear(m, 8), nn.Tanh(), nn.Linear(8, N)).double()
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        nn.init.normal_(parameter, std=0.5, generator=_seeded(parameter.numel()))
    return encoder, decoder


def _gradients(objective, encoder, x, noise):
    mean, log_var = encoder(x).chunk(2, dim=1)
    loss = objective.at_noise(x, mean, log_var, noise).loss
    wrt = (*encoder.parameters(), *objective.decoder.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, wrt)])


# The bounds of the others change with their draws.
@pytest.mark.parametrize("class_", [Sampling, StickingTheLanding])
@pytest.mark.parametrize("draws", DRAWS[1:])
def test_the_mean_gradient_is_that_of_independent_draws(class_, draws):
    encoder, decoder = _model()
    x = torch.randn(1, N, dtype=torch.float64, generator=_seeded(1)).expand(50, N)
    means = []
    for kind in ("iid", draws):
        objective = class_(decoder, noise_var=NOISE_VAR, samples=4, draws=kind)
        blocks = [
            _gradients(objective, encoder, x, _noise(4, 50, M, draws=kind, seed=seed))
            for seed in range(80)
        ]
        blocks = torch.stack(blocks)
        means.append((blocks.mean(0), blocks.var(0) / len(blocks)))
    (ours, our_error), (theirs, their_error) = means
    error = (our_error + their_error).sqrt()
    assert ((ours - theirs).abs() / error.clamp_min(1e-12)).max() < 4.5


@pytest.mark.parametrize("draws", DRAWS[1:])
def test_in_a_narrow_posterior_the_gradient_has_less_variance(draws):
    encoder, decoder = _model()
    with torch.no_grad():
        encoder.bias[M:] = -6
    x = torch.randn(1, N, dtype=torch.float64, generator=_seeded(1))
    variance = {}
    for kind in ("iid", draws):
        objective = Sampling(decoder, noise_var=NOISE_VAR, samples=4, draws=kind)
        noises = (_noise(4, 1, M, draws=kind, seed=seed) for seed in range(100))
        gradients = torch.stack([_gradients(objective, encoder, x, noise) for noise in noises])
        # The decoder's, which are odd in the noise but for curvature.
        variance[kind] = gradients[:, -sum(p.numel() for p in decoder.parameters()) :].var(0).sum()
    assert variance["iid"] > 5 * variance[draws]


def _pairs_by_quadrature(class_, encoder, x, points=1501):
    """E of the gradient over one antithetic pair with m = 1, by the trapezoidal rule."""
    _, decoder = _model(1)
    objective = class_(decoder, noise_var=NOISE_VAR, samples=2, draws="antithetic")
    nodes = torch.linspace(-9, 9, points, dtype=torch.float64)
    weights = torch.exp(-0.5 * nodes.square())
    total = 0
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        noise = torch.stack([node, -node]).view(2, 1, 1).expand(2, len(x), 1)
        total = total + weight * _gradients(objective, encoder, x, noise)
    return total


@pytest.mark.slow
def test_the_pairs_own_doubly_reparameterised_gradient_is_exact():
    encoder, _ = _model(1)
    x = torch.randn(3, N, dtype=torch.float64, generator=_seeded(1))
    total = _pairs_by_quadrature(ImportanceWeighted, encoder, x)
    ours = _pairs_by_quadrature(DoublyReparameterized, encoder, x)
    torch.testing.assert_close(ours, total, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_the_gradient_of_independent_draws_would_be_biased_in_pairs(monkeypatch):
    encoder, _ = _model(1)
    x = torch.randn(3, N, dtype=torch.float64, generator=_seeded(1))
    total = _pairs_by_quadrature(ImportanceWeighted, encoder, x)
    draw = DoublyReparameterized._draw

    def as_if_independent(self, *given):
        self.draws = "iid"
        return draw(self, *given)

    monkeypatch.setattr(DoublyReparameterized, "_draw", as_if_independent)
    biased = _pairs_by_quadrature(DoublyReparameterized, encoder, x)
    parameters = sum(p.numel() for p in encoder.parameters())
    assert (biased - total)[:parameters].norm() > 0.01 * total[:parameters].norm()
    torch.testing.assert_close(biased[parameters:], total[parameters:])


@pytest.mark.parametrize("draws", DRAWS)
def test_a_bound_stays_a_bound(draws):
    # A linear decoder, whose log p(x) is known.
    torch.manual_seed(0)
    decoder = nn.Linear(M, N, bias=False).double()
    x = torch.randn(1, N, dtype=torch.float64)
    W = decoder.weight.detach()
    cov = W @ W.T + NOISE_VAR * torch.eye(N)
    exact = torch.distributions.MultivariateNormal(torch.zeros(N).double(), cov).log_prob(x)
    count = 4000
    mean, log_var = torch.zeros(count, M).double(), torch.zeros(count, M).double()
    values = ImportanceWeighted(decoder, noise_var=NOISE_VAR, samples=4, draws=draws)(
        x.expand(count, N), mean, log_var, generator=_seeded(0)
    ).objective
    assert values.mean() + 4 * values.std() / math.sqrt(count) < exact


def test_what_is_refused():
    decoder = nn.Linear(M, N)
    for class_, draws in TAKEN:
        with pytest.raises(ValueError, match="come in pairs, give an even number"):
            class_(decoder, samples=3, draws=draws)
    with pytest.raises(ValueError, match="'stratified'.*'antithetic'"):
        Sampling(decoder, draws="stratified")
    with pytest.raises(ValueError, match="'orthogonal' would bias.*give iid or antithetic"):
        DoublyReparameterized(decoder, samples=2, draws="orthogonal")
    objective = Sampling(decoder, samples=8, draws="orthogonal")
    with pytest.raises(ValueError, match="3 latent dimensions.*give at most 6"):
        objective(torch.zeros(2, N), torch.zeros(2, M), torch.zeros(2, M))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("class_", "draws"), TAKEN)
def test_any_latents_take_any_draws(class_, draws, dtype):
    decoder = nn.Linear(M, N).to(dtype)
    mean, log_var = (0.1 * torch.randn(2, B, M, generator=_seeded(0))).to(dtype).requires_grad_()
    objective = class_(decoder, samples=4, draws=draws)
    terms = objective(torch.zeros(B, N, dtype=dtype), mean, log_var, generator=_seeded(1))
    terms.loss.backward()
    assert terms.objective.dtype == torch.float32 and decoder.weight.grad.isfinite().all()
    again = objective(torch.zeros(B, N, dtype=dtype), mean, log_var, generator=_seeded(1))
    assert torch.equal(terms.objective, again.objective)
