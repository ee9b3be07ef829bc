"""Fitting latents: against closed forms, scipy, and plain float64 arithmetic."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares
from torch import nn

import fastsfvae as sf
from fastsfvae.fit import _Objective
from fastsfvae.jacobian.run import cache
from tests.decoders import DECODERS, M, batch, build

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def linear(n=9):
    torch.manual_seed(0)
    return nn.Linear(M, n).double()


def tanh(n=12):
    torch.manual_seed(1)
    layers = nn.Linear(M, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, n)
    return nn.Sequential(*layers).double()


def objective(decoder, x, z, *args, c=1.0, prior_var=None, weight=None):
    """F by its formula, [B]."""
    weight = torch.ones_like(x) if weight is None else weight
    value = (weight * (x - decoder(z, *args)).square()).flatten(1).sum(1) / (2 * c)
    return value if prior_var is None else value + z.square().sum(1) / (2 * prior_var)


def gauss_newton(decoder, z, *args, c=1.0, prior_var=None, weight=None):
    """H by reverse mode, [B, m, m]."""
    rows = []
    for i in range(len(z)):
        own = [t[i : i + 1] for t in args]
        J = torch.autograd.functional.jacobian(lambda z, own=own: decoder(z, *own)[0], z[i : i + 1])
        J = J.detach().flatten(0, -3).squeeze(1)
        w = torch.ones(len(J), dtype=z.dtype) if weight is None else weight[i].flatten()
        rows.append(J.T @ (w[:, None] * J) / c)
    H = torch.stack(rows)
    return H if prior_var is None else H + torch.eye(z.shape[1], dtype=z.dtype) / prior_var


def close(found, want, tolerance=1e-10):
    assert found.shape == want.shape
    assert (found - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("prior_var", [None, 0.7])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_linear_decoder_is_solved_in_one_step(prior_var, weighted):
    decoder, x, c = linear(), draw(5, 9), 0.3
    weight = draw(5, 9, seed=1).square() if weighted else torch.ones(5, 9, dtype=F64)
    settings = {"prior_var": prior_var, "noise_var": c, "weight": weight if weighted else None}
    found = sf.fit_latents(decoder, x, draw(5, M, seed=2), damping=0, **settings)
    A, b = decoder.weight.detach(), decoder.bias.detach()
    H = A.T @ (weight.unsqueeze(-1) * A) / c
    H = H if prior_var is None else H + torch.eye(M, dtype=F64) / prior_var
    z = torch.linalg.solve(H, (weight * (x - b)) @ A / c)
    close(found.z, z, 1e-12)
    close(found.covariance, torch.linalg.inv(H), 1e-12)
    close(found.squared_error, (weight * (x - z @ A.T - b).square()).sum(1), 1e-12)
    assert found.converged.all() and found.steps.tolist() == [1] * 5
    adapted = sf.fit_latents(decoder, x, draw(5, M, seed=2), tol=0, **settings)
    close(adapted.z, z, 1e-6)
    assert adapted.converged.all()


@pytest.mark.parametrize("prior_var", [None, 2.0])
def test_it_agrees_with_scipy(prior_var):
    decoder, c = tanh(), 0.5
    x, z0 = decoder(draw(6, M)).detach() + 0.1 * draw(6, 12, seed=1), 0.1 * draw(6, M, seed=2)
    found = sf.fit_latents(
        decoder, x, z0, prior_var=prior_var, noise_var=c, steps=100, tol=0, damping="lm"
    )

    def residuals(z, i):
        z = torch.from_numpy(z)[None]
        of_data = (x[i] - decoder(z)[0]).detach().numpy() / math.sqrt(c)
        return of_data if prior_var is None else np.append(of_data, z / math.sqrt(prior_var))

    for i in range(6):
        # From where it ended: another minimum may be nearer to the start for another method.
        near = found.z[i].numpy() + 0.01
        best = least_squares(residuals, near, args=(i,), xtol=1e-15, ftol=1e-15, gtol=1e-15)
        assert best.success
        # A minimum is flat: z is known to the root of F's rounding.
        close(found.z[i], torch.from_numpy(best.x), 1e-6)
        value = objective(decoder, x[i : i + 1], found.z[i : i + 1], c=c, prior_var=prior_var)
        assert abs(value.item() - best.cost) <= 1e-10 * best.cost
    assert found.converged.all()


@pytest.mark.parametrize("prior_var", [None, 0.5])
@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder(name, prior_var):
    decoder = build(name)
    x, z0, _ = (t.detach() for t in batch(decoder))
    weight = draw(*x.shape, seed=4).square()
    settings = {"prior_var": prior_var, "noise_var": 0.3, "weight": weight}
    own = {"c": 0.3, "prior_var": prior_var, "weight": weight}
    before = z0.clone()
    values = [objective(decoder, x, z0, **own).detach()]
    for steps in (0, 1, 3, 40):
        found = sf.fit_latents(decoder, x, z0, steps=steps, **settings)
        values.append(objective(decoder, x, found.z, **own).detach())
        assert (found.steps <= steps).all()
        error = objective(decoder, x, found.z, c=0.5, weight=weight).detach()
        close(found.squared_error, error)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            H = gauss_newton(decoder, found.z, **own)
        # H's own rounding, by its condition.
        condition = torch.linalg.cond(H).max()
        if condition < 1e8:
            close(found.covariance, torch.linalg.inv(H), max(1e-10, 1e-15 * float(condition)))
    assert torch.equal(values[0], values[1])
    assert all((b <= a).all() for a, b in zip(values, values[1:], strict=False))
    assert (values[-1] < values[0]).all()
    assert torch.equal(z0, before)


def test_a_converged_fit_has_no_gradient_left():
    decoder = tanh()
    x, z0 = draw(5, 12), draw(5, M, seed=1)
    found = sf.fit_latents(decoder, x, z0, prior_var=1.0, noise_var=0.5, steps=100, tol=1e-12)
    assert found.converged.all()
    z = found.z.clone().requires_grad_()
    value = objective(decoder, x, z, c=0.5, prior_var=1.0)
    (g,) = torch.autograd.grad(value.sum(), z)
    H = gauss_newton(decoder, found.z, c=0.5, prior_var=1.0)
    decrement = (g * torch.linalg.solve(H, g)).sum(1) / 2
    assert (decrement <= 1.001e-12 * value).all()
    # One that says no has more of it.
    early = sf.fit_latents(decoder, x, z0, prior_var=1.0, noise_var=0.5, steps=1, tol=1e-12)
    assert not early.converged.any() and early.steps.tolist() == [1] * 5


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_perfect_fit_converges(dtype):
    decoder = tanh().to(dtype)
    z = draw(8, M).to(dtype)
    x = decoder(z).detach()
    found = sf.fit_latents(decoder, x, z + 0.05, steps=50, tol=1e-6)
    assert found.converged.all() and found.steps.max() < 20
    eps = torch.finfo(dtype).eps
    assert (found.squared_error <= (64 * eps) ** 2 * x.square().sum(1)).all()
    at_once = sf.fit_latents(decoder, x, z)
    assert at_once.converged.all() and not at_once.steps.any()
    assert torch.equal(at_once.z, z)


def test_what_is_masked_may_be_anything():
    decoder, x = tanh(), draw(5, 12)
    mask = (draw(5, 12, seed=1) > -0.5).double()
    z0 = 0.1 * draw(5, M, seed=2)
    want = sf.fit_latents(decoder, x, z0, prior_var=1.0, weight=mask)
    hidden = torch.where(mask > 0, x, math.nan)
    found = sf.fit_latents(decoder, hidden, z0, prior_var=1.0, weight=mask)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    # One sample's mask is the same as a decoder without what it hides.
    for i in range(5):
        seen = mask[i].bool()
        part = sf.fit_latents(
            lambda z, seen=seen: decoder(z)[:, seen], x[i : i + 1, seen], z0[i : i + 1],
            prior_var=1.0,
        )  # fmt: skip
        close(found.z[i : i + 1], part.z)
        close(found.covariance[i : i + 1], part.covariance)
    ones = sf.fit_latents(decoder, x, z0, prior_var=1.0, weight=torch.ones_like(x))
    plain = sf.fit_latents(decoder, x, z0, prior_var=1.0)
    close(ones.z, plain.z)
    nothing = sf.fit_latents(decoder, x, z0, prior_var=1.0, weight=torch.zeros_like(x))
    assert nothing.z.abs().max() < 1e-8 and nothing.converged.all()
    close(nothing.covariance, torch.eye(M, dtype=F64).expand(5, M, M))


class Field(nn.Module):
    """A decoder of coordinates: a latent and a point to n numbers."""

    def __init__(self, n):
        super().__init__()
        self.lift, self.out = nn.Linear(M + 2, 16), nn.Linear(16, n)

    def forward(self, z, points):
        return self.out(self.lift(torch.cat([z, points], 1)).tanh())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 3, 6])
def test_one_latent_seen_through_many_samples(n, weighted):
    torch.manual_seed(n)
    field, points, z0 = Field(n).double(), draw(40, 2), 0.1 * draw(1, M)
    x = field(draw(1, M, seed=3).expand(40, M), points).detach() + 0.01 * draw(40, n, seed=4)
    weight = draw(40, n, seed=5).square() if weighted else None
    settings = {"prior_var": 3.0, "noise_var": 0.1, "tol": 1e-8}
    found = sf.fit_latents(field, x, z0, points, joint=True, weight=weight, **settings)

    # The same as a decoder with all of it as one output.
    def whole(z):
        return field(z.repeat_interleave(40, 0), points.repeat(len(z), 1)).view(len(z), -1)

    one = {} if weight is None else {"weight": weight.view(1, -1)}
    want = sf.fit_latents(whole, x.view(1, -1), z0, **one, **settings)
    assert found.z.shape == (1, M) and found.squared_error.shape == found.steps.shape == (1,)
    assert found.converged.all() and torch.equal(found.steps, want.steps)
    for mine, other in zip(found[:3], want[:3], strict=True):
        close(mine, other)
    for chunk_size in (1, 7, 40):
        cut = sf.fit_latents(
            field, x, z0, points, joint=True, weight=weight, chunk_size=chunk_size, **settings
        )
        close(cut.z, found.z)
        close(cut.covariance, found.covariance)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_forward_and_reverse_mode_agree(n, joint, monkeypatch):
    torch.manual_seed(n)
    field, points, x = Field(n).double(), draw(9, 2), draw(9, n, seed=1)
    z0 = draw(1 if joint else 9, M, seed=2)

    def fit(**settings):
        return sf.fit_latents(field, x, z0, points, steps=3, prior_var=1.0, joint=joint, **settings)

    backward = fit()
    with monkeypatch.context() as patch:
        patch.setattr("fastsfvae.fit.pullback", None)
        assert torch.equal(fit(backend="torch").z, backward.z)
    monkeypatch.setattr("fastsfvae.fit.gram_by_rows", None)
    with pytest.raises(TypeError):
        fit()
    forward = fit(backend="reference")
    for mine, other in zip(backward[:3], forward[:3], strict=True):
        close(mine, other, 1e-12)


@pytest.mark.parametrize("name", ["higgins", "tanh"])
@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_chunks_change_rounding_only(name, chunk_size):
    decoder = build(name)
    x, z0, _ = (t.detach() for t in batch(decoder))
    settings = {"prior_var": 1.0, "noise_var": 0.2, "steps": 5}
    found = sf.fit_latents(decoder, x, z0, chunk_size=chunk_size, **settings)
    want = sf.fit_latents(decoder, x, z0, **settings)
    for mine, other in zip(found[:3], want[:3], strict=True):
        close(mine, other)


def test_samples_do_not_depend_on_each_other(monkeypatch):
    """Those that have stopped are left out on a CPU."""
    decoder, x = tanh(), draw(16, 12)
    z0 = draw(16, M, seed=1)
    settings = {"prior_var": 1.0, "noise_var": 0.05, "steps": 40}
    sizes = []
    curvature = _Objective.curvature
    monkeypatch.setattr(
        _Objective, "curvature", lambda self, z: sizes.append(len(z)) or curvature(self, z)
    )
    found = sf.fit_latents(decoder, x, z0, **settings)
    assert sizes[0] == 16 and sizes[-1] <= 8 and len(sizes) == 1 + int(found.steps.max())
    assert len(set(found.steps.tolist())) > 1
    for i in range(16):
        alone = sf.fit_latents(decoder, x[i : i + 1], z0[i : i + 1], **settings)
        close(found.z[i : i + 1], alone.z, 1e-8)
        assert alone.steps == found.steps[i] and alone.converged == found.converged[i]


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.lift = nn.Embedding(3, 5), nn.Linear(M + 5, 8)

    def forward(self, z, labels, scale, *, shift):
        h = self.lift(torch.cat([z, self.table(labels)], 1)).tanh()
        # An input without a batch axis, with any number of rows.
        return h * scale.sum(0) + shift


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9])
def test_further_inputs(rows):
    torch.manual_seed(0)
    decoder, labels = Labelled().double(), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    x, z0 = draw(8, 8), draw(8, M, seed=1)
    scale, shift = 1 + draw(rows, 8, seed=2).square(), draw(8, 8, seed=3)
    settings = {"prior_var": 1.0, "noise_var": 0.05, "steps": 40, "tol": 1e-9}
    found = sf.fit_latents(decoder, x, z0, labels, scale, shift=shift, **settings)
    for i in range(8):
        own = sf.fit_latents(
            lambda z, i=i: decoder(z, labels[i : i + 1], scale, shift=shift[i : i + 1]),
            *(x[i : i + 1], z0[i : i + 1]),
            **settings,
        )
        close(found.z[i : i + 1], own.z, 1e-6)
        close(found.squared_error[i : i + 1], own.squared_error, 1e-8)


def test_a_function_and_a_method_do_as_a_module():
    decoder, x, z0 = tanh(), draw(5, 12), draw(5, M, seed=1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = decoder

        def decode(self, z, scale=1.0):
            return scale * self.net(z)

    weight = draw(5, 12, seed=2).square()
    for extra in ({"prior_var": 1.0}, {"prior_var": 1.0, "weight": weight}):
        want = sf.fit_latents(decoder, x, z0, **extra)
        method = Model().decode
        for same in (lambda z: decoder(z), method, functools.partial(method, scale=1.0)):
            found = sf.fit_latents(same, x, z0, **extra)
            for mine, other in zip(found[:3], want[:3], strict=True):
                close(mine, other)


def test_a_module_is_traced_once(monkeypatch):
    decoder, x, z0 = tanh(), draw(6, 12), draw(6, M, seed=1)
    traces = []
    trace = cache.Linearizer._trace
    monkeypatch.setattr(
        cache.Linearizer, "_trace", lambda self, b: traces.append(b) or trace(self, b)
    )
    for seed in range(3):
        weight = draw(6, 12, seed=seed).square()
        sf.fit_latents(decoder, x, z0, weight=weight, prior_var=1.0)
    assert len(traces) == 1
    # A function is as well, but for one call.
    sf.fit_latents(lambda z: decoder(z), x, z0, prior_var=1.0)
    assert len(traces) == 2


@pytest.mark.parametrize("n", [3, 12])
def test_nothing_is_written_into_the_decoder(n):
    decoder = tanh(n).train()
    decoder[2].requires_grad_(False)
    before = {name: p.clone() for name, p in decoder.state_dict().items()}
    x, z0 = draw(5, n).requires_grad_(), draw(5, M, seed=1).requires_grad_()
    c = torch.tensor(0.3, dtype=F64, requires_grad=True)
    found = sf.fit_latents(decoder, x, z0, noise_var=c, prior_var=2 * c)
    assert all(p.grad is None for p in [*decoder.parameters(), x, z0, c])
    assert not any(t.requires_grad for t in found)
    assert all(torch.equal(before[name], p) for name, p in decoder.state_dict().items())
    assert [p.requires_grad for p in decoder.parameters()] == [True, True, False, False, True, True]
    same = sf.fit_latents(decoder, x, z0, noise_var=0.3, prior_var=0.6)
    close(found.z, same.z)
    assert torch.equal(sf.fit_latents(decoder, x, z0, steps=0).z, z0)


def test_what_a_forward_writes_is_undone():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, z):
            self.calls = self.calls + 1
            return super().forward(z)

    for n in (2, 9):
        decoder = Counting(M, n)
        sf.fit_latents(decoder, torch.ones(3, n), torch.zeros(3, M))
        assert decoder.calls == 0
