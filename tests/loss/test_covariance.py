"""Full latent covariances: in the objective, pushed forward, and after an observation; probes."""

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

import fastsfvae as sf
from fastsfvae._spread import _hadamard_probes
from tests._triton import DEVICE, requires_triton
from tests.loss.test_elbo import LIKELIHOODS, Conditional, batch, by_hand, decoder

B, M, N = 5, 3, 8


def close(got, want, tolerance=1e-10):
    for ours, theirs in zip(got, want, strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) <= tolerance * scale


def factor():
    """Lower triangular, of covariances far from diagonal."""
    g = torch.Generator().manual_seed(3)
    L = 0.4 * torch.randn(B, M, M, dtype=torch.float64, generator=g).tril()
    return (L + 0.5 * torch.eye(M, dtype=torch.float64)).requires_grad_()


def dense(f, x, mean, L, c, gamma, likelihood, kl_weight):
    """The objective per sample, from dense covariances: that of f(mean + L e) at e = 0."""
    values = []
    for xi, mu, root in zip(x, mean, L, strict=True):
        zeros = torch.zeros(1, M, dtype=mu.dtype)
        along = lambda e, mu=mu, root=root: f(mu + e @ root.T)  # noqa: E731
        # N(0, I) has no divergence from N(0, I), so that by_hand's own part vanishes.
        value = by_hand(along, xi[None], zeros, zeros, c, gamma, likelihood)
        eye = torch.eye(M, dtype=mu.dtype)
        posterior = MultivariateNormal(mu, root @ root.T)
        kl = kl_divergence(posterior, MultivariateNormal(torch.zeros_like(mu), eye))
        values.append(value[0] - kl_weight * kl)
    return torch.stack(values)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_objective_of_a_full_covariance(likelihood, backend):
    f, (x, mean, _), L = decoder(), batch(), factor()
    c = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    gamma = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    kl_weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    scalars = {"noise_var": c, "gamma": gamma, "kl_weight": kl_weight, "likelihood": likelihood}
    leaves = [mean, L, c, kl_weight, *f.parameters()]
    leaves += [gamma] if likelihood != "expected" else []
    want = dense(f, x, mean, L, c, gamma, likelihood, kl_weight)
    weight = torch.linspace(0.5, 2, B, dtype=torch.float64)
    want_grads = torch.autograd.grad((want * weight).sum(), leaves)
    for chunk_size in (None, 2):
        options = {"backend": backend, "chunk_size": chunk_size, **scalars}
        terms = sf.sampling_free_elbo(f, x, mean, L, **options)
        close([terms.elbo], [want])
        close([terms.log_likelihood - kl_weight * terms.kl], [want])
        close(torch.autograd.grad((terms.elbo * weight).sum(), leaves), want_grads)
        loss = sf.SamplingFreeLoss(f, reduction="sum", **options)
        value, found = loss(x, mean, L, sample_weight=weight, return_terms=True)
        close([value, found.elbo], [-(want * weight).sum(), want])
        close([-g for g in torch.autograd.grad(value, leaves)], want_grads)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_diagonal_factor_is_the_diagonal_posterior(likelihood):
    f, (x, mean, log_var) = decoder(), batch()
    L = torch.diag_embed((0.5 * log_var).exp())
    for backend in ("torch", "reference"):
        options = {"likelihood": likelihood, "gamma": 0.7, "backend": backend}
        close(
            sf.sampling_free_elbo(f, x, mean, L, **options),
            sf.sampling_free_elbo(f, x, mean, log_var, **options),
        )


def test_a_factor_with_further_inputs_and_a_square_batch():
    # B = m: the factor is told from log variances by its axes, not by its extents.
    f, label = Conditional().double(), torch.tensor([1, 2, 3])
    x, mean, log_var = batch(B=M)
    L = torch.diag_embed((0.5 * log_var).exp())
    terms = sf.sampling_free_elbo(f, x, mean, L, label, scale=1.2)
    close(terms, sf.sampling_free_elbo(f, x, mean, log_var, label, scale=1.2))


@pytest.mark.parametrize("full", [True, False])
def test_the_pushed_forward_gaussian(full):
    f, (x, mean, log_var), L = decoder(), batch(), factor()
    cov = L @ L.mT if full else log_var.exp()
    c = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found = sf.LinearizedGaussian.from_decoder(f, mean, cov, c)
    output, J = sf.decode_with_jacobian(f, mean, backend="reference")
    J, dense_cov = J.flatten(2), cov if full else torch.diag_embed(cov)
    want = MultivariateNormal(output.flatten(1), J.mT @ dense_cov @ J + c * torch.eye(N).double())
    close([found.covariance_matrix, found.variance], [want.covariance_matrix, want.variance])
    values = [d.log_prob(x.flatten(1)) for d in (found, want)]
    close(values[:1], values[1:])
    leaves = [mean, L if full else log_var, *f.parameters()]
    grads = [torch.autograd.grad(v.sum(), leaves, retain_graph=True) for v in values]
    close(*grads)


@pytest.mark.parametrize("full", [True, False])
def test_the_kalman_filter_of_a_linear_decoder(full):
    torch.manual_seed(0)
    f, L, (_, mean, log_var) = nn.Linear(M, N).double(), factor(), batch()
    x, c = torch.randn(B, N, dtype=torch.float64), 0.2
    cov = L @ L.mT if full else log_var.exp()
    P, W = cov if full else torch.diag_embed(cov), f.weight
    S = W @ P @ W.T + c * torch.eye(N, dtype=torch.float64)
    gain = P @ W.T @ S.inverse()
    residual = (x - f(mean)).unsqueeze(-1)
    want = (
        mean + (gain @ residual).squeeze(-1),
        P - gain @ W @ P,
        MultivariateNormal(f(mean), S).log_prob(x),
    )
    found = sf.kalman_update(f, x, mean, cov, c)
    close(found, want, 1e-13)
    assert torch.equal(found.cov, found.cov.mT)


@pytest.mark.parametrize("full", [True, False])
def test_every_gradient_of_an_update(full):
    f, (x, mean, log_var), L = decoder(), batch(), factor()
    c = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    leaves = [x, mean, L if full else log_var, c, *f.parameters()]

    def results(found):
        total = sum((t * torch.arange(t.numel()).cos().view(t.shape)).sum() for t in found)
        return torch.autograd.grad(total, leaves, retain_graph=True)

    cov = L @ L.mT if full else log_var.exp()
    P = cov if full else torch.diag_embed(cov)
    output, J = sf.decode_with_jacobian(f, mean, backend="reference")
    W = J.flatten(2).mT
    S = W @ P @ W.mT + c * torch.eye(N, dtype=torch.float64)
    gain, r = P @ W.mT @ S.inverse(), (x - output).flatten(1)
    updated = mean + (gain @ r.unsqueeze(-1)).squeeze(-1), P - gain @ W @ P
    want = (*updated, MultivariateNormal(output.flatten(1), S).log_prob(x.flatten(1)))
    for chunk_size in (None, 2):
        found = sf.kalman_update(f, x, mean, cov, c, chunk_size=chunk_size)
        close(found, want)
        close(results(found), results(want))


@pytest.mark.parametrize("full", [True, False])
def test_an_update_linearised_elsewhere(full):
    f, (x, mean, log_var), L = decoder(), batch(), factor()
    at = (mean.detach() + 0.3).requires_grad_()
    leaves = [at, mean, L if full else log_var, *f.parameters()]
    cov = L @ L.mT if full else log_var.exp()
    P = cov if full else torch.diag_embed(cov)
    output, J = sf.decode_with_jacobian(f, at, backend="reference")
    W = J.flatten(2).mT
    loc = output.flatten(1) + (W @ (mean - at).unsqueeze(-1)).squeeze(-1)
    S = W @ P @ W.mT + 0.3 * torch.eye(N, dtype=torch.float64)
    gain, r = P @ W.mT @ S.inverse(), x.flatten(1) - loc
    updated = mean + (gain @ r.unsqueeze(-1)).squeeze(-1), P - gain @ W @ P
    want = (*updated, MultivariateNormal(loc, S).log_prob(x.flatten(1)))
    found = sf.kalman_update(f, x, mean, cov, 0.3, at=at)
    close(found, want)
    weights = [torch.arange(t.numel()).cos().view(t.shape) for t in want]
    totals = [sum((w * t).sum() for w, t in zip(weights, ts, strict=True)) for ts in (found, want)]
    close(*(torch.autograd.grad(total, leaves, retain_graph=True) for total in totals))


def test_iterated_updates_end_at_the_mode():
    f, (x, mean, _) = decoder(), batch()
    prior = torch.zeros_like(mean), torch.ones_like(mean)
    fit = sf.fit_latents(f, x, mean, prior_var=1.0, noise_var=0.3, steps=50, tol=0.0)
    found = sf.kalman_update(f, x, *prior, 0.3, at=fit.z)
    close([found.mean, found.cov], [fit.z, fit.covariance], 1e-7)
    with pytest.raises(ValueError, match=r"mean \(5, 3\) and at \(5, 2\) must both be"):
        sf.kalman_update(f, x, *prior, 0.3, at=fit.z[:, :2])


def test_an_update_in_float32_that_rounding_would_break():
    torch.manual_seed(0)
    f = nn.Linear(M, N, bias=False)
    with torch.no_grad():
        f.weight[:, 1] = f.weight[:, 0] * (1 + 1e-6)
    mean, cov = torch.zeros(2, M), torch.ones(2, M)
    x = f(torch.ones(2, M)).detach()
    found = sf.kalman_update(f, x, mean, cov, 1e-9)
    assert all(torch.isfinite(t).all() for t in found)
    assert float((f(found.mean) - x).abs().max()) < 1e-3
    assert float(torch.linalg.eigvalsh(found.cov.double()).min()) >= 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cov": torch.zeros(5, 3, 2)}, r"give mean \[B, m\] and variances"),
        ({"cov": -torch.ones(5, 3)}, "give none below 0"),
        ({"cov": torch.zeros(5, 3, 3)}, "cov of sample 0 is not positive definite"),
        ({"noise_var": 0.0}, "must be finite and positive"),
    ],
)
def test_wrong_covariances(given, message):
    given = {"mean": torch.zeros(5, 3), "cov": torch.ones(5, 3), "noise_var": 0.5} | given
    f = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=message) as found:
        sf.LinearizedGaussian.from_decoder(f, **given)
    assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match=message):
        sf.kalman_update(f, torch.zeros(5, 4), **given)


def test_wrong_factors_and_probes():
    f, (x, mean, log_var) = decoder(), batch()
    with pytest.raises(ValueError, match=r"or log_var a factor \[B, m, m\]"):
        sf.sampling_free_elbo(f, x, mean, log_var[:, None])
    with pytest.raises(ValueError, match='use likelihood="expected"'):
        sf.SamplingFreeLoss(f, probes=2)
    for probes in (0, True, 1.5):
        with pytest.raises(ValueError, match="must be None or an int >= 1"):
            sf.sampling_free_elbo(f, x, mean, log_var, likelihood="expected", probes=probes)


def test_probes_are_orthogonal_signs():
    for m, count in ((8, 8), (6, 5), (5, 8), (200, 16)):
        v = _hadamard_probes(torch.zeros(3, m, dtype=torch.float64), count, None)
        assert v.shape == (count, 3, m) and torch.equal(v.abs(), torch.ones_like(v))
        if m == 1 << (m - 1).bit_length():
            products = torch.einsum("kbm,lbm->bkl", v, v)
            assert torch.equal(products, m * torch.eye(count).double().expand(3, -1, -1))
        # All rows: the identity itself.
        if count == 1 << (m - 1).bit_length():
            outer = torch.einsum("kbi,kbj->bij", v, v)
            assert torch.equal(outer, count * torch.eye(m).double().expand(3, -1, -1))


@pytest.mark.slow
@pytest.mark.parametrize("full", [True, False])
def test_probes_are_unbiased(full):
    """Values and gradients, over many draws, against the exact ones."""
    torch.manual_seed(0)
    m, draws = 6, 1500
    f = nn.Sequential(nn.Linear(m, 9), nn.Tanh(), nn.Linear(9, N)).double()
    x, mean = torch.rand(2, N).double(), torch.randn(2, m).double().requires_grad_()
    spread = torch.randn(2, m, m).double().tril() if full else torch.randn(2, m).double() - 1
    leaves = [mean, spread.requires_grad_(), *f.parameters()]

    def results(**settings):
        loss = sf.SamplingFreeLoss(f, likelihood="expected", **settings)
        value = loss(x, mean, spread)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    want = results()
    close(results(probes=m), want, 1e-14)
    found = [
        torch.stack(parts) for parts in zip(*(results(probes=2) for _ in range(draws)), strict=True)
    ]
    assert float(found[0].std()) > 0
    for ours, theirs in zip(found, want, strict=True):
        error = (ours.mean(0) - theirs).abs()
        assert (error <= 5 * ours.std(0) / draws**0.5 + 1e-12).all()


def test_probes_repeat_with_their_generator():
    f, (x, mean, log_var) = decoder(m=6), batch(m=6)
    loss = sf.SamplingFreeLoss(f, likelihood="expected", probes=2)
    values = [loss(x, mean, log_var, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert "probes=2" in repr(loss)


class TestTriton:
    pytestmark = requires_triton

    @pytest.mark.parametrize("likelihood", LIKELIHOODS)
    def test_objective_of_a_full_covariance(self, likelihood):
        f, (x, mean, _), L = decoder(), batch(), factor()
        leaves = [mean, L, *f.parameters()]
        want = sf.SamplingFreeLoss(f, likelihood=likelihood, backend="torch")(x, mean, L)
        want_grads = torch.autograd.grad(want, leaves)
        f = f.float().to(DEVICE)
        x, mean, L = (t.detach().float().to(DEVICE).requires_grad_() for t in (x, mean, L))
        got = sf.SamplingFreeLoss(f, likelihood=likelihood, backend="triton")(x, mean, L)
        grads = torch.autograd.grad(got, [mean, L, *f.parameters()])
        close([got.cpu().double()], [want], 1e-5)
        close([g.cpu().double() for g in grads], want_grads, 1e-4)

    def test_an_update_and_probes(self):
        f, (x, mean, log_var) = decoder(m=6), batch(m=6)
        want = sf.kalman_update(f, x, mean, log_var.exp(), 0.3)
        options = {"likelihood": "expected", "probes": 2}
        exact = sf.SamplingFreeLoss(f, **options)
        wanted = exact(x, mean, log_var, generator=torch.Generator().manual_seed(1))
        f = f.float().to(DEVICE)
        x, mean, log_var = (t.detach().float().to(DEVICE) for t in (x, mean, log_var))
        got = sf.kalman_update(f, x, mean, log_var.exp(), 0.3, backend="triton")
        close([t.cpu().double() for t in got], want, 1e-5)
        if DEVICE == "cpu":
            loss = sf.SamplingFreeLoss(f, backend="triton", **options)
            value = loss(x, mean, log_var, generator=torch.Generator().manual_seed(1))
            close([value.double()], [wanted], 1e-5)
