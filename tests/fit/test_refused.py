"""What a fit refuses, in one line."""

import math

import pytest
import torch
from torch import nn

import fastsfvae as sf
from tests.decoders import M
from tests.fit.test_fit import tanh

REFUSED = {
    "steps=-1 must be an int >= 0": {"steps": -1},
    "steps=2.0 must be an int >= 0": {"steps": 2.0},
    "damping=-1 must be finite and not negative, or \"lm\"": {"damping": -1},
    "damping='adaptive' is not a number: give one that is >= 0, or \"lm\"": {"damping": "adaptive"},
    "prior_var=0 must be finite and positive": {"prior_var": 0},
    "noise_var=0 must be finite and positive": {"noise_var": 0},
    "tol=nan must be finite and not negative": {"tol": math.nan},
    "backend='gpu' is not one of": {"backend": "gpu"},
    "chunk_size must be None or an int >= 1": {"chunk_size": 0},
    "weight has shape (12,) but x has (5, 12)": {"weight": torch.ones(12)},
    "weight has dtype torch.bool": {"weight": torch.ones(5, 12, dtype=torch.bool)},
    "weight has -1.0 as its smallest": {"weight": -torch.ones(5, 12)},
    "no weight may be negative or NaN": {"weight": torch.full((5, 12), math.nan)},
    "weight is a float": {"weight": 2.0},
    "z0 has shape (5, 4): with joint=True one latent [1, m]": {"joint": True},
    "x must be [B, *out] with z's B = 5, got shape (4, 12)": {"x": torch.ones(4, 12)},
    "x has shape (5, 11) but the decoder returns (5, 12)": {"x": torch.ones(5, 11)},
    "x has shape (5, 3) but the decoder returns (5, 12)": {"x": torch.ones(5, 3)},
    "x has shape (5, 0): it is empty": {"x": torch.ones(5, 0)},
    "x is a NoneType": {"x": None},
    "x has dtype torch.int64": {"x": torch.ones(5, 12).long()},
    "z must be [B, m]": {"z0": torch.ones(M)},
    "decoder must be an nn.Module or a callable": {"decoder": 3},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(message):
    given = {"decoder": tanh().float(), "x": torch.ones(5, 12), "z0": torch.zeros(5, M)}
    with pytest.raises((TypeError, ValueError)) as refused:
        sf.fit_latents(**given | REFUSED[message])
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("n", [3, 12])
def test_a_weight_does_not_hide_a_wrong_shape(n):
    decoder, x = tanh(12).float(), torch.ones(5, n, 1)
    with pytest.raises(ValueError, match="they must match"):
        sf.fit_latents(decoder, x, torch.zeros(5, M), weight=torch.ones_like(x))


@pytest.mark.parametrize("n", [2, 12])
def test_batch_statistics_are_refused(n):
    decoder = nn.Sequential(nn.Linear(M, 8), nn.BatchNorm1d(8), nn.Linear(8, n))
    x, z0 = torch.ones(5, n), torch.randn(5, M)
    with pytest.raises(RuntimeError, match="batch statistics"):
        sf.fit_latents(decoder, x, z0)
    found = sf.fit_latents(decoder.eval(), x, z0)
    assert (found.squared_error < (x - decoder(z0)).square().sum(1)).all()
