"""Scale and direction of a gradient's error, where the true gradient is known exactly."""

import math

import pytest
import torch
from torch import nn

from fastsfvae import evaluate
from fastsfvae.elbo import sampling_free_elbo

F64 = torch.float64
C = 0.5


class Encoder(nn.Linear):
    def forward(self, x):
        return super().forward(x).chunk(2, dim=1)


@pytest.fixture(scope="module")
def problem():
    """A linear decoder, of which `expected` is the ELBO itself."""
    torch.manual_seed(11)
    encoder, decoder = Encoder(5, 4).double(), nn.Linear(2, 5).double()
    x = torch.randn(6, 5, dtype=F64)
    with torch.no_grad():
        decoder.weight.mul_(2)
        mean, log_var = encoder(x)
    return encoder, decoder, x, mean, log_var


def _gradients(problem, likelihood, gamma, variables):
    encoder, decoder, x, mean, log_var = problem
    mean, log_var = variables if encoder is None else encoder(x)
    elbo = sampling_free_elbo(
        decoder, x, mean, log_var, noise_var=C, gamma=gamma, likelihood=likelihood
    ).elbo
    leaves = list(variables) if encoder is None else list(encoder.parameters())
    parts = {"encoder": leaves, "decoder": list(decoder.parameters())}
    grads = torch.autograd.grad(-elbo.mean(), [v for part in parts.values() for v in part])
    count = len(leaves)
    split = {"encoder": grads[:count], "decoder": grads[count:]}
    return {name: torch.cat([g.flatten() for g in part]) for name, part in split.items()}


def _find(problem, seed=0, encoder=True, repeats=20, **settings):
    own, decoder, *batch = problem
    return evaluate.gradient_error(
        *(decoder, *batch),
        noise_var=C,
        encoder=own if encoder else None,
        samples=(1, 20),
        repeats=repeats,
        generator=torch.Generator().manual_seed(seed),
        **settings,
    )


@pytest.mark.parametrize("encoder", [True, False], ids=["weights", "posterior"])
def test_scale_and_direction_of_a_known_bias(problem, encoder):
    own, decoder, x, mean, log_var = problem
    leaves = [t.clone().requires_grad_() for t in (mean, log_var)]
    given = problem if encoder else (None, *problem[1:])
    truth = _gradients(given, "expected", 0.5, leaves)
    mine = _gradients(given, "precision", 0.95, leaves)
    found = _find(problem, encoder=encoder, repeats=100, gamma=0.95)
    squared_bias = 0.0
    for name, g in truth.items():
        part, a = getattr(found, name), mine[name]
        squared_bias += float((a - g).square().sum())
        exact = {
            "norm": g.norm(),
            "relative_bias": (a - g).norm() / g.norm(),
            "cosine": a @ g / (a.norm() * g.norm()),
        }
        for quantity, value in exact.items():
            error = getattr(part, f"{quantity}_error")
            assert 0 < error < 0.05 * max(1, float(value)), (name, quantity)
            assert abs(getattr(part, quantity) - float(value)) < 5 * error, (name, quantity)
        # What K draws have the same relative error, by the deviations that were measured.
        one = [d * k**0.5 for k, d in zip((1, 20), part.relative_deviation, strict=True)]
        assert one[0] == pytest.approx(one[1], rel=0.25)
        squared = (one[0] ** 2 + one[1] ** 2) / 2
        assert part.equal_samples == pytest.approx(squared / part.relative_bias**2, rel=1e-9)
    assert found.gradient_bias == pytest.approx(squared_bias**0.5, rel=0.1)


def test_the_errors_are_as_large_as_they_say(problem):
    """Over many seeds the estimates lie about the exact values by their standard errors."""
    truth = _gradients(problem, "expected", 0.5, None)["decoder"]
    mine = _gradients(problem, "precision", 0.5, None)["decoder"]
    exact = {
        "norm": float(truth.norm()),
        "relative_bias": float((mine - truth).norm() / truth.norm()),
        "cosine": float(mine @ truth / (mine.norm() * truth.norm())),
    }
    found = [_find(problem, seed=seed).decoder for seed in range(30)]
    for quantity, value in exact.items():
        z = torch.tensor(
            [(getattr(f, quantity) - value) / getattr(f, f"{quantity}_error") for f in found]
        )
        # Student's t of 9 degrees: deviation 1.13; of 30, its own error is 13%.
        assert 0.6 < float(z.square().mean().sqrt()) < 1.8, quantity
        assert abs(float(z.mean())) < 4 * 1.13 / 30**0.5, quantity


def test_an_unbiased_objective_points_along_the_truth(problem):
    found = _find(problem, likelihood="expected")
    for part in (found.encoder, found.decoder):
        # Rounding alone takes a cosine past 1 by less than its error.
        assert abs(part.cosine - 1) < 5 * part.cosine_error + 1e-12
        assert part.relative_bias < 0.1
        assert part.equal_samples > 5


def test_what_is_not_known_is_nan(problem):
    encoder, decoder, *batch = problem
    found = _find(problem, repeats=2)
    assert math.isnan(found.decoder.cosine_error) and math.isfinite(found.decoder.cosine)
    decoder.requires_grad_(False)
    frozen = _find(problem, repeats=3).decoder
    decoder.requires_grad_(True)
    assert all(math.isnan(v) for v in (frozen.norm, frozen.relative_bias, frozen.cosine))
    assert all(math.isnan(v) for v in frozen.relative_deviation)


def test_an_encoder_of_something_else_is_refused(problem):
    own, decoder, *batch = problem
    settings = {"noise_var": C, "samples": (1,), "repeats": 2}

    def call(encoder, problem=tuple(batch)):
        evaluate.gradient_error(decoder, *problem, encoder=encoder, **settings)

    x, mean, log_var = batch
    for other in (Encoder(5, 4).double(), Encoder(5, 2).double()):
        with pytest.raises(ValueError, match=r"mean \(6, 2\) is not encoder\(x\)'s"):
            call(other)
    with pytest.raises(ValueError, match="log_var .* is not encoder"):
        call(own, (x, mean, log_var + 1))
    with pytest.raises(TypeError, match="encoder is a function: give the nn.Module"):
        call(lambda x: (mean, log_var))
    with pytest.raises(TypeError, match="encoder returned a Tensor"):
        call(nn.Linear(5, 2).double())
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        call(Encoder(5, 4).double().requires_grad_(False))
    tied = Encoder(5, 4).double()
    tied.add_module("decoder", decoder)
    with pytest.raises(ValueError, match="share parameters"):
        call(tied, (x, *(t.detach() for t in tied(x))))
    with pytest.raises(ValueError, match="samples is empty"):
        evaluate.gradient_error(decoder, *batch, noise_var=C, samples=())
