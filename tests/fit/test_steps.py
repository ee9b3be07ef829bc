"""How a fit moves: damping, what cannot be stepped on, and what ends it."""

import math

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae import levenberg_marquardt
from tests.decoders import M
from tests.fit.test_fit import F64, close, draw, gauss_newton, linear, objective, tanh


@pytest.mark.parametrize("damping", ["lm", 0, 0.1])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_singular_gram_has_a_pseudo_inverse(damping, dtype):
    # Of four latents two are seen, in two directions that are no axes.
    torch.manual_seed(0)
    seen = nn.Linear(M, 2, bias=False)
    decoder = nn.Sequential(seen, nn.Linear(2, 9, bias=False)).to(dtype)
    A = (decoder[1].weight @ decoder[0].weight).detach().double()
    x, z0 = draw(5, 9).to(dtype), draw(5, M, seed=1).to(dtype)
    found = sf.fit_latents(decoder, x, z0, noise_var=0.3, damping=damping, steps=50)
    tolerance = 1e-10 if dtype == F64 else 1e-4
    close(found.covariance.double(), (0.3 * torch.linalg.pinv(A.T @ A, rtol=1e-8)).expand(5, M, M),
          tolerance)  # fmt: skip
    assert found.z.isfinite().all()
    if damping != 0:
        onto = torch.linalg.pinv(A, rtol=1e-5).T @ A.T
        best = (x.double() - x.double() @ onto).square().sum(1)
        close(found.squared_error.double(), best, 1e-3)
        assert found.converged.all()


def test_no_step_exists_without_any_curvature():
    class Constant(nn.Module):
        def forward(self, z):
            return 0 * z.sum(1, keepdim=True) + torch.ones(3, dtype=F64)

    x, z0 = draw(4, 3), draw(4, M)
    for decoder, z in ((Constant(), z0), (lambda z: torch.ones(len(z), 3, dtype=F64), z0[:, :2])):
        found = sf.fit_latents(decoder, x, z)
        assert torch.equal(found.z, z) and found.converged.all()
        assert not found.covariance.any() and not found.steps.any()


class Steep(nn.Module):
    """Overflows float32 at latents above 88."""

    def forward(self, z):
        return z.exp()


def test_a_decoder_that_overflows_keeps_the_best_point():
    x, z0 = torch.full((6, M), 1e6), torch.full((6, M), -3.0)
    value = objective(Steep(), x, z0)
    # The first step goes to exp(1e6 / exp(-3)).
    found = sf.fit_latents(Steep(), x, z0, damping=0)
    assert torch.equal(found.z, z0) and torch.equal(found.squared_error, 2 * value)
    assert found.covariance.isfinite().all() and not found.converged.any()
    assert found.steps.tolist() == [1] * 6
    few = sf.fit_latents(Steep(), x, z0, steps=1)
    assert torch.equal(few.z, z0) and not few.converged.any()
    found = sf.fit_latents(Steep(), x, z0, steps=60, tol=1e-8)
    assert found.converged.all()
    close(found.z, torch.full((6, M), math.log(1e6)), 1e-4)


def test_a_start_that_is_not_finite_says_so():
    z0 = torch.zeros(3, M)
    z0[1] = 200
    found = sf.fit_latents(Steep(), torch.ones(3, M), z0 + 0.3, prior_var=1.0)
    assert found.converged.tolist() == [True, False, True] and found.steps[1] == 0
    assert torch.equal(found.z[1], z0[1] + 0.3) and not found.squared_error[1].isfinite()
    assert found.covariance[1].isnan().all() and found.covariance[::2].isfinite().all()


def test_float32_is_as_good_as_its_rounding():
    exact = tanh()
    x, z0 = draw(5, 12), draw(5, M, seed=1)
    want = sf.fit_latents(exact, x, z0, prior_var=1.0, noise_var=0.5, tol=0, steps=100)
    decoder = tanh().float()
    found = sf.fit_latents(decoder, x.float(), z0.float(), prior_var=1.0, noise_var=0.5, steps=100,
                           tol=0)  # fmt: skip
    assert found.z.dtype == found.covariance.dtype == found.squared_error.dtype == torch.float32
    assert found.steps.dtype == torch.int64 and found.converged.dtype == torch.bool
    settings = {"c": 0.5, "prior_var": 1.0}
    value = objective(exact, x, found.z.double(), **settings)
    assert (value <= objective(exact, x, want.z, **settings) * (1 + 4e-6)).all()


def moves_of(decoder, x, z0, monkeypatch, **settings):
    """The states behind each move."""
    states, move = [], levenberg_marquardt._move

    def noted(*args):
        found = move(*args)
        states.append(found[0])
        return found

    monkeypatch.setattr(levenberg_marquardt, "_move", noted)
    sf.fit_latents(decoder, x, z0, **settings)
    return states


def test_damping_falls_after_good_moves(monkeypatch):
    # The model of a linear decoder is exact: each gain ratio is 1.
    decoder, x, z0 = linear(), draw(1, 9), draw(1, M, seed=1)
    states = moves_of(decoder, x, z0, monkeypatch, steps=1, tol=0)
    A, b = decoder.weight.detach(), decoder.bias.detach()
    H, z = A.T @ A, z0
    damping = 1e-2 * H.trace() / M
    for state in states[:3]:
        damped = H + damping * torch.eye(M, dtype=F64)
        damping = damping / 10
        close(state.damping, damping.view(1))
        z = z - torch.linalg.solve(damped, A.T @ ((z @ A.T + b) - x)[0])
        close(state.best.z, z)


def test_damping_grows_after_bad_moves(monkeypatch):
    x, z0 = torch.full((1, 1), 1e6, dtype=F64), torch.full((1, 1), -3.0, dtype=F64)
    states = moves_of(Steep(), x, z0, monkeypatch, steps=1, tol=1e-12)
    # 2, 4, 8, ... times as much after each.
    want = 1e-2 * math.exp(-6) * 2.0 ** torch.tensor([1, 3, 6, 10, 15, 21])
    close(torch.cat([s.damping for s in states]), want.double(), 1e-6)
    assert all(torch.equal(s.best.z, z0) for s in states)


def test_the_curvature_is_that_of_where_it_ends(monkeypatch):
    """However often H was kept."""
    decoder, x, z0 = tanh(), draw(5, 12), draw(5, M, seed=1)
    for steps in (1, 2):
        found = sf.fit_latents(decoder, x, z0, steps=steps, prior_var=1.0, noise_var=0.1)
        assert (found.z != z0).any(1).all()
        H = gauss_newton(decoder, found.z, c=0.1, prior_var=1.0)
        close(found.covariance, torch.linalg.inv(H))
