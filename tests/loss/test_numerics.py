"""Hostile numbers through a decoder: the objective and the pullback against 150-digit arithmetic.

The decoder is z W with a W of its own for each sample, evaluated at a multiple of one unit vector:
then the output and J = W are exact in any dtype, and only what the library does with them is seen.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastsfvae as sf
from fastsfvae._checks import LIKELIHOODS
from tests.hostile import (
    EPS,
    GAMMAS,
    Cotangents,
    Inputs,
    bounds,
    draw_jacobian,
    draw_noise,
    draw_residual,
    draw_variances,
    dtype_name,
    exact_terms,
    gram_rounding,
)


class Linear(nn.Module):
    """One weight ``[m, n]`` for each sample, as a further input ``[B, m, n]``."""

    def forward(self, z: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("bm,bmn->bn", z, weight)


DECODER = Linear()


class Batch(NamedTuple):
    """x ``[B, n]``, mean and log_var ``[B, m]``, weight ``[B, m, n]``: views of any kind; 0-d c."""

    x: Tensor
    mean: Tensor
    log_var: Tensor
    weight: Tensor
    c: Tensor

    def sample(self, index: int) -> Inputs:
        """What the primitive is given of a sample; none of it has been rounded but r, once."""
        h, r = self.log_var.exp()[index], (self.x - DECODER(self.mean, self.weight))[index]
        return Inputs(self.weight[index], r, h, self.c)


def _as_view(draw, t: Tensor) -> Tensor:
    """The same values: as they are, with an offset, strided, or transposed."""
    kind = draw(st.sampled_from(["plain", "offset", "strided", "transposed"]))
    room = torch.full((2 * t.numel() + 3,), float("nan"), dtype=t.dtype)
    if kind == "offset":
        return room[3 : 3 + t.numel()].view(t.shape).copy_(t)
    if kind == "strided":
        return room[3:].view(*t.shape, 2)[..., 1].copy_(t)
    return t.mT.contiguous().mT if kind == "transposed" else t


@st.composite
def batches(draw) -> Batch:
    """m > n, n = 1 and one weight that all samples share among them."""
    B, m, n = (draw(st.integers(1, top)) for top in (3, 5, 6))
    dtype = draw(st.sampled_from(list(EPS)))
    shared = draw(st.booleans())
    weight = torch.stack([draw_jacobian(draw, m, n) for _ in range(1 if shared else B)])
    mean = torch.zeros(B, m, dtype=torch.float64)
    for row in mean:
        row[draw(st.integers(0, m - 1))] = draw(st.sampled_from([-2.0, 0.0, 1.0, 4.0]))
    log_var = torch.stack([draw_variances(draw, m) for _ in range(B)]).log()
    x = torch.stack([draw_residual(draw, n) for _ in range(B)])
    if draw(st.booleans()):
        x = x + DECODER(mean, weight.expand(B, m, n))
    x, mean, log_var, weight = (
        _as_view(draw, t.to(dtype)).detach() for t in (x, mean, log_var, weight)
    )
    # A broadcast view has one row in memory.
    return Batch(x, mean, log_var, weight.expand(B, m, n), draw_noise(draw).to(dtype))


class Setting(NamedTuple):
    likelihood: str
    gamma: float
    kl_weight: float
    chunk_size: int | None
    by_loss: bool


@st.composite
def setups(draw) -> Setting:
    return Setting(
        draw(st.sampled_from(LIKELIHOODS)),
        draw(st.sampled_from(GAMMAS)),
        draw(st.sampled_from([0.0, 0.3, 1.0])),
        draw(st.sampled_from([None, 1, 2])),
        draw(st.booleans()),
    )


class Part(NamedTuple):
    """A value and its gradients by the primitive's inputs, or bounds of the errors of both."""

    value: Tensor
    in_J: Tensor
    in_r: Tensor
    in_log_h: Tensor
    in_c: Tensor


def _sum(*parts: Part) -> Part:
    return Part(*(sum(fields) for fields in zip(*parts, strict=True)))


def _primitive_part(inputs: Inputs, g: Cotangents) -> tuple[Part, Part] | None:
    """The sum of the terms under g and its bound; None beyond float64."""
    exact = exact_terms(inputs, g)
    of_gram = gram_rounding(inputs, exact.lost_share)
    if of_gram is None:
        return None
    allowed = bounds(inputs, exact.C_inv, g, of_gram)
    terms = exact.log_det, exact.explained, inputs.r.double().square().sum()
    errors = allowed.log_det, allowed.explained, terms[2] * EPS[inputs.r.dtype] * len(inputs.r)
    value = sum(a * t for a, t in zip(g, terms, strict=True))
    error = sum(abs(a) * t for a, t in zip(g, errors, strict=True))
    in_log_h = exact.in_h * inputs.h.double()
    return Part(value, exact.in_J, exact.in_r, in_log_h, exact.in_c), Part(error, *allowed[2:])


def _expected_part(inputs: Inputs, g: Cotangents) -> tuple[Part, Part]:
    J, r, h, c = (t.double() for t in inputs)
    traces = h * J.square().sum(1) / c
    exact = Part(
        g.log_det * traces.sum() + g.rr * r.square().sum(),
        2 * g.log_det * h[:, None] * J / c,
        2 * g.rr * r,
        g.log_det * traces,
        -g.log_det * traces.sum() / c,
    )
    size = (sum(J.shape) + 4) * EPS[inputs.r.dtype]
    return exact, Part(*(t.abs() * size for t in exact))


def _log_likelihood(inputs: Inputs, setting: Setting) -> tuple[Part, Part] | None:
    """A sample's log-likelihood and its bound."""
    c, n, rounding = float(inputs.c), len(inputs.r), EPS[inputs.r.dtype]
    # As the library holds it.
    gamma = torch.tensor(setting.gamma, dtype=inputs.r.dtype)
    weight = float(gamma) if setting.likelihood == "mixture" else 1.0
    g = Cotangents(-weight / 2, float(gamma) / (2 * c), -1 / (2 * c))
    if setting.likelihood == "expected":
        parts = [_expected_part(inputs, g)]
        own_of_c = float(inputs.r.double().square().sum()) / (2 * c * c)
    else:
        parts = [_primitive_part(inputs, g)]
        if setting.likelihood == "normalized" and setting.gamma < 1:
            second = inputs._replace(h=(1 - gamma) * inputs.h)
            parts.append(_primitive_part(second, Cotangents(0.5, 0.0, 0.0)))
        if None in parts:
            return None
        # g's terms are c's own as well, but for the log-determinants.
        of_log_det = _primitive_part(inputs, g._replace(explained=0.0, rr=0.0))[0].value
        own_of_c = -float(parts[0][0].value - of_log_det) / c
    exact, allowed = (_sum(*kind) for kind in zip(*parts, strict=True))
    constant = -0.5 * n * math.log(2 * math.pi * c)
    size = float(inputs.r.double().square().sum()) / (2 * c)
    own_error = allowed.value / c + 8 * rounding * (size / c + n / (2 * c))
    exact = exact._replace(value=exact.value + constant, in_c=exact.in_c + own_of_c - n / (2 * c))
    allowed = allowed._replace(
        value=allowed.value + 8 * rounding * (size + abs(constant) + exact.value.abs()),
        in_c=allowed.in_c + own_error,
    )
    return exact, allowed


NAMES = ("value", "gradient in x", "in the mean", "in log h", "in the weight", "in c")


def _objective(inputs: Inputs, mean: Tensor, setting: Setting):
    """What `NAMES` lists of a sample, and the bounds; None beyond float64."""
    found = _log_likelihood(inputs, setting)
    if found is None:
        return None
    exact, allowed = found
    J, _, h, _ = (t.double() for t in inputs)
    mean, rounding, beta = mean.double(), EPS[inputs.r.dtype], setting.kl_weight
    kls = 0.5 * (h + mean.square() - 1 - h.log())
    want = (
        exact.value - beta * kls.sum(),
        exact.in_r,
        -J @ exact.in_r - beta * mean,
        exact.in_log_h - 0.5 * beta * (h - 1),
        exact.in_J - torch.outer(mean, exact.in_r),
        exact.in_c,
    )
    count = (sum(J.shape) + 4) * rounding
    in_r = allowed.in_r + count * exact.in_r.abs()
    size = h + mean.square() + 1 + h.log().abs()
    bound = (
        allowed.value + count * beta * size.sum(),
        in_r,
        J.abs() @ in_r + count * beta * mean.abs(),
        allowed.in_log_h + count * (exact.in_log_h.abs() + beta * (h + 1)),
        allowed.in_J + count * exact.in_J.abs() + torch.outer(mean.abs(), in_r),
        allowed.in_c,
    )
    return want, bound


def _evaluate(batch: Batch, setting: Setting):
    """(objective [B], its sum's gradients in x, mean, log_var, weight and c)."""
    leaves = [t.detach().requires_grad_() for t in batch]
    x, mean, log_var, weight, c = leaves
    options = setting._asdict() | {"noise_var": c}
    del options["by_loss"]
    if setting.by_loss:
        loss = sf.SamplingFreeLoss(DECODER, reduction="sum", **options)
        value, terms = loss(x, mean, log_var, weight, return_terms=True)
        return terms.elbo, *(-g for g in torch.autograd.grad(value, leaves))
    objective = sf.sampling_free_elbo(DECODER, x, mean, log_var, weight, **options).elbo
    return objective.detach(), *torch.autograd.grad(objective.sum(), leaves)


def _check_objective(largest_error, tally, batch: Batch, setting: Setting):
    subject = f"hostile inputs to the objective, {dtype_name(batch.x)}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*auto-encoder")
        value, *grads = _evaluate(batch, setting)
    tally(subject, "cases", len(batch.x))
    tally(subject, "NaNs", sum(int(t.isnan().any()) for t in (value, *grads)))
    assert all(bool(t.isfinite().all()) for t in (value, *grads))
    tiny = torch.finfo(batch.x.dtype).tiny
    in_c, allowed_in_c = torch.zeros(2, 1, dtype=torch.float64)
    for index in range(len(batch.x)):
        found = _objective(batch.sample(index), batch.mean[index], setting)
        if found is None:
            tally(subject, "beyond float64: finite")
            in_c = None
            continue
        want, bound = found
        got = value[index], *(g[index] for g in grads[:4])
        for name, mine, exact, allowed in zip(NAMES, got, want, bound, strict=False):
            error = (mine.double() - exact).abs()
            assert bool((error <= allowed + tiny).all()), (name, error, allowed, exact)
            largest_error(subject, f"{name} (of its bound)", (error / (allowed + tiny)).max())
        if in_c is not None:
            in_c, allowed_in_c = in_c + want[-1], allowed_in_c + bound[-1]
    if in_c is not None:
        error = (grads[-1].double() - in_c).abs()
        assert bool((error <= allowed_in_c + EPS[batch.x.dtype] * in_c.abs() + tiny).all())


@pytest.mark.slow
def test_the_objective_stays_within_its_error_bound(request, largest_error, tally):
    count = request.config.getoption("--examples")

    @settings(deadline=None, max_examples=count, derandomize=True, database=None)
    @given(batches(), setups())
    def run(batch, setting):
        _check_objective(largest_error, tally, batch, setting)

    run()


def _check_pullback(largest_error, tally, batch: Batch, chunk_size: int | None):
    """Against numbers of 64 bits of mantissa; each result is a sum of at most n + m products."""
    subject = f"hostile inputs to the pullback, {dtype_name(batch.x)}"
    x, mean, weight = (t.detach().requires_grad_() for t in (batch.x, batch.mean, batch.weight))
    found = sf.pullback(DECODER, mean, x, weight, chunk_size=chunk_size)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in found[1:]]
    grads = torch.autograd.grad(found[1:], (x, mean, weight), cotangents)
    tally(subject, "cases", len(batch.x))
    tally(subject, "NaNs", sum(int(t.isnan().any()) for t in (*found, *grads)))
    for index in range(len(batch.x)):
        J, r, _, _ = batch.sample(index)
        given = (J, r, batch.mean[index], *(g[index] for g in cotangents))
        exact = [t.double().numpy().astype(np.longdouble) for t in given]
        size = (sum(J.shape) + 4) * EPS[J.dtype]
        want, bound = _pulled_back(*exact, sign=-1), _pulled_back(*map(abs, exact), sign=1)
        got = (t[index] for t in (*found[1:], *grads))
        names = "gram", "projection", "squared error", "in x", "in the mean", "in the weight"
        for name, mine, truth, scale in zip(names, got, want, bound, strict=True):
            error = abs(mine.detach().double().numpy() - truth)
            allowed = size * scale + torch.finfo(J.dtype).tiny
            assert (error <= allowed).all(), (name, error, allowed)
            largest_error(subject, f"{name} (of its bound)", (error / allowed).max())


def _pulled_back(J, r, mean, d_gram, d_projection, d_error, sign):
    """G, p, rr and the gradients in x, the mean and the weight."""
    in_r = J.T @ d_projection + 2 * d_error * r
    in_J = (d_gram + d_gram.T) @ J + np.outer(d_projection, r)
    values = J @ J.T, J @ r, r @ r
    return *values, in_r, sign * (J @ in_r), in_J + sign * np.outer(mean, in_r)


def test_the_pullback_stays_within_its_error_bound(request, largest_error, tally):
    count = request.config.getoption("--examples")

    @settings(deadline=None, max_examples=count, derandomize=True, database=None)
    @given(batches(), st.sampled_from([None, 1, 2]))
    def run(batch, chunk_size):
        _check_pullback(largest_error, tally, batch, chunk_size)

    run()


def test_batches_of_4096_equal_their_samples():
    generator = torch.Generator().manual_seed(0)
    sizes = (4096, 7), (4096, 3), (4096, 3), (4096, 3, 7)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
    x, mean, _, weight = tensors
    whole = sf.sampling_free_elbo(DECODER, *tensors)
    pulled = sf.pullback(DECODER, mean, x, weight)
    for row in (0, 1, 2047, 4095):
        alone = [t[row : row + 1] for t in tensors]
        of_one = sf.sampling_free_elbo(DECODER, *alone)
        for all_, one in zip(whole, of_one, strict=True):
            assert torch.allclose(all_[row], one[0], rtol=1e-12)
        of_one = sf.pullback(DECODER, alone[1], alone[0], alone[3])
        for all_, one in zip(pulled, of_one, strict=True):
            assert torch.allclose(all_[row], one[0], rtol=1e-12)


def test_a_square_beyond_the_dtype_is_not_formed():
    """Found by the draws: (w / s)^2 is 1e41 where gamma = 0 and h = 1e-20, and its factor is 0."""
    grads = []
    for dtype in (torch.float32, torch.float64):
        weight = torch.tensor([[[1.541e7, -2.9343e6], [-2.1788e7, 5.6843e6]]], dtype=dtype)
        x, mean = (torch.tensor([v], dtype=dtype) for v in ([1.541, -0.2934], [0.0, -2.0]))
        log_var = torch.tensor([[0.0, -46.0517]], dtype=dtype, requires_grad=True)
        found = sf.sampling_free_elbo(DECODER, x, mean, log_var, weight, noise_var=1e-7, gamma=0.0)
        (grad,) = torch.autograd.grad(found.log_likelihood.sum(), log_var)
        grads.append(grad.double())
    # What float32's e^log_var and weight leave of A, whose factorisation is redone in float64.
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=0)
