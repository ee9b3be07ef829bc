"""Where the `precision` objective drifts to, in closed form (docs/method.md).

Of a linear decoder with orthogonal columns everything splits into dimensions: with g = |J_i|^2 / c,
t the data's coordinate along J_i in units of its length, h the variance, mu the mean,

    objective = const - g (t - mu)^2 / 2 (1 - gamma h g / (1 + h g)) - log(1 + h g) / 2 - KL
    KL = (h + mu^2 - 1 - log h) / 2

and the ELBO has g ((t - mu)^2 + h) / 2 in place of the first two.
"""

import math

import pytest
import torch
from torch import nn

import fastsfvae as sf

F64 = torch.float64
C = 0.5
G = torch.tensor([0.1, 1.0, 10.0, 30.0, 100.0], dtype=F64)
M, N = len(G), 8


def best_of_elbo(g):
    return 1 / (1 + g)


def best_of_precision(g):
    """At gamma 0: the root of h + g h^2 = 1."""
    return ((1 + 4 * g).sqrt() - 1) / (2 * g)


def elbo_lost(g):
    """By h* in place of the ELBO's own, in nats."""
    ratio = best_of_precision(g) * (1 + g)
    return (ratio - 1 - ratio.log()) / 2


def best_mean(h, g, t, gamma):
    weight = g * (1 - gamma * h * g / (1 + h * g))
    return weight * t / (1 + weight)


def slope(h, g, t, gamma):
    """2 d objective / dh along the best mean."""
    off = t - best_mean(h, g, t, gamma)
    return 1 / h - 1 - g / (1 + h * g) + gamma * (g * off / (1 + h * g)) ** 2


def highest_root(g, t, gamma):
    """By bisection: `slope` is positive for small h and negative at 1e3."""
    low, high = torch.full_like(g, 1e-8), torch.full_like(g, 1e3)
    grid = torch.logspace(-8, 3, 4000, dtype=F64).unsqueeze(1)
    signs = slope(grid, g, t, gamma) > 0
    # One change of sign, or the maximum is not known.
    assert ((signs[1:] != signs[:-1]).sum(0) == 1).all()
    for _ in range(200):
        middle = (low * high).sqrt()
        rising = slope(middle, g, t, gamma) > 0
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    return low


def orthogonal_decoder(g=G, c=C):
    """A linear decoder with orthogonal columns of length sqrt(g c), and their directions."""
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(N, len(g), dtype=F64)).Q
    decoder = nn.Linear(len(g), N).double().requires_grad_(False)
    decoder.weight.copy_(directions * (g * c).sqrt())
    return decoder


def data(decoder, t):
    """x ``[1, N]`` with coordinates t along the columns, and a part beside them."""
    beside = torch.linalg.svd(decoder.weight).U[:, -1]
    return (decoder(t) + 0.7 * beside).unsqueeze(0)


def maximise(decoder, x, likelihood, gamma):
    """Mean and h ``[m]`` by L-BFGS on the library's objective."""
    mean, log_var = (torch.zeros(1, M, dtype=F64, requires_grad=True) for _ in range(2))
    settings = {"noise_var": C, "gamma": gamma, "likelihood": likelihood}

    def closure():
        optimizer.zero_grad()
        loss = -sf.sampling_free_elbo(decoder, x, mean, log_var, **settings).elbo.sum()
        loss.backward()
        return loss

    # A line search knows an optimum to the root of the value's rounding; steps by gradients alone
    # go on from there.
    for search in ("strong_wolfe", None):
        optimizer = torch.optim.LBFGS(
            [mean, log_var],
            max_iter=200,
            tolerance_grad=1e-13,
            tolerance_change=0,
            history_size=20,
            line_search_fn=search,
        )
        optimizer.step(closure)
    return mean.detach()[0], log_var.detach()[0].exp()


def exact_elbo(decoder, x, mean, h):
    r = x - decoder(mean)
    trace = (decoder.weight.square() * h.unsqueeze(-2)).sum((-1, -2))
    likelihood = -N / 2 * math.log(2 * math.pi * C) - (r.square().sum(-1) + trace) / (2 * C)
    return likelihood - (h + mean.square() - 1 - h.log()).sum(-1) / 2


T = torch.tensor([0.5, -1.0, 0.8, 1.2, -0.3], dtype=F64)


def test_the_closed_forms_of_gamma_zero():
    decoder = orthogonal_decoder()
    x = data(decoder, T)
    mean, h = maximise(decoder, x, "precision", 0.0)
    torch.testing.assert_close(h, best_of_precision(G), rtol=1e-8, atol=0)
    torch.testing.assert_close(mean, best_mean(h, G, T, 0.0), rtol=1e-8, atol=1e-8)
    # `expected` is the ELBO of a linear decoder: the same mean, the variance of the posterior.
    best, variance = maximise(decoder, x, "expected", 0.0)
    torch.testing.assert_close(variance, best_of_elbo(G), rtol=1e-8, atol=0)
    torch.testing.assert_close(best, mean, rtol=1e-8, atol=1e-8)
    lost = exact_elbo(decoder, x, best, variance) - exact_elbo(decoder, x, mean, h)
    torch.testing.assert_close(lost[0], elbo_lost(G).sum(), rtol=1e-8, atol=0)
    # g^-1/2 and half its inverse, in the limit.
    large = torch.tensor(1e8, dtype=F64)
    assert float(best_of_precision(large) * large.sqrt()) == pytest.approx(1, rel=1e-3)
    assert float(elbo_lost(large) / large.sqrt()) == pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize("gamma", [0.5, 0.95])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_gamma_widens_the_variance_further(gamma, scale):
    decoder, t = orthogonal_decoder(), scale * T
    mean, h = maximise(decoder, data(decoder, t), "precision", gamma)
    root = highest_root(G, t, gamma)
    torch.testing.assert_close(h, root, rtol=1e-7, atol=0)
    torch.testing.assert_close(mean, best_mean(root, G, t, gamma), rtol=1e-7, atol=1e-8)
    assert (h >= best_of_precision(G) * (1 - 1e-8)).all()


def test_the_gap_is_jensens_and_what_gamma_explains():
    """For any J, h, r, c and gamma, at the optimum or not: never negative."""
    torch.manual_seed(1)
    for gamma in (0.0, 0.3, 0.5, 0.95, 1.0):
        for scale in (1e-2, 1.0, 30.0):
            decoder = nn.Linear(M, N).double().requires_grad_(False)
            decoder.weight.copy_(scale * torch.randn(N, M))
            mean, log_var = torch.randn(6, M, dtype=F64), torch.randn(6, M, dtype=F64)
            x = 3 * torch.randn(6, N, dtype=F64)
            settings = {"noise_var": C, "gamma": gamma, "likelihood": "precision"}
            objective = sf.sampling_free_elbo(decoder, x, mean, log_var, **settings).elbo
            gap = objective - exact_elbo(decoder, x, mean, log_var.exp())
            J = decoder.weight * (0.5 * log_var).exp().unsqueeze(1)
            A = J.mT @ J
            eye = torch.eye(M, dtype=F64)
            projected = (J.mT @ (x - decoder(mean)).unsqueeze(-1)).squeeze(-1)
            explained = (projected * torch.linalg.solve(C * eye + A, projected)).sum(-1)
            trace = A.diagonal(dim1=1, dim2=2).sum(1) / C
            jensen = (trace - torch.logdet(eye + A / C)) / 2
            torch.testing.assert_close(
                gap, jensen + gamma / (2 * C) * explained, rtol=1e-9, atol=1e-9
            )
            assert (gap > 0).all()


def test_the_gap_that_is_measured_is_that_of_the_formula():
    decoder = orthogonal_decoder()
    x = data(decoder, T)
    mean, h = maximise(decoder, x, "precision", 0.0)
    found = sf.evaluate.objective_gap(
        *(decoder, x, mean.unsqueeze(0), h.log().unsqueeze(0)),
        noise_var=C,
        gamma=0.0,
        samples=100_000,
        generator=torch.Generator().manual_seed(0),
    )
    jensen = float((h * G - (1 + h * G).log()).sum() / 2)
    # Var |r - v|^2 / (2c)^2, v = J sqrt(h) e with covariance D: (4 r^T D r + 2 tr D^2) / (2c)^2.
    off = (T - mean) * G.sqrt()
    noise = float((off.square() * h * G + (h * G).square() / 2).sum() / 100_000) ** 0.5
    assert jensen > 100 * noise
    assert float(found.gap) == pytest.approx(jensen, abs=5 * noise)
    # It lies above log p(x) too, which the ELBO reaches here at its own optimum.
    log_p = exact_elbo(decoder, x, *maximise(decoder, x, "expected", 0.0))
    assert float(found.objective) > float(log_p) + 1
