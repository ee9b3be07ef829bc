"""Fitting on the Triton backend, against float64."""

import pytest
import torch
from torch import nn

import fastsfvae as sf
from tests._triton import DEVICE, requires_triton

pytestmark = requires_triton


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_it_agrees_with_float64(activation, weighted):
    torch.manual_seed(0)
    layers = nn.Linear(5, 12), activation(), nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 35)
    decoder = nn.Sequential(*layers).to(DEVICE)
    x, z0 = torch.rand(4, 35, device=DEVICE), 0.5 * torch.randn(4, 5, device=DEVICE)
    weight = torch.rand(4, 35, device=DEVICE) if weighted else None
    settings = {"prior_var": 1.0, "noise_var": 0.3, "steps": 3}
    found = sf.fit_latents(decoder, x, z0, backend="triton", weight=weight, **settings)
    plain = sf.fit_latents(decoder, x, z0, backend="torch", weight=weight, **settings)
    decoder.double()
    wide = None if weight is None else weight.double()
    exact = sf.fit_latents(decoder, x.double(), z0.double(), weight=wide, **settings)
    eps = torch.finfo(torch.float32).eps
    for mine, torchs, want in zip(found[:3], plain[:3], exact[:3], strict=True):
        scale = want.abs().max()
        lost = (torchs - want).abs().max()
        assert (mine - want).abs().max() <= 2 * lost + 16 * eps * scale
    assert torch.equal(found.steps, plain.steps)


def test_one_latent_through_many_samples():
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift, self.out = nn.Linear(3 + 2, 16), nn.Linear(16, 6)

        def forward(self, z, points):
            return self.out(self.lift(torch.cat([z, points], 1)).tanh())

    torch.manual_seed(0)
    field, points, x = Field().to(DEVICE), torch.rand(7, 2, device=DEVICE), torch.rand(7, 6)
    x, z0 = x.to(DEVICE), torch.zeros(1, 3, device=DEVICE)
    settings = {"joint": True, "prior_var": 1.0, "steps": 3}
    found = sf.fit_latents(field, x, z0, points, backend="triton", **settings)
    plain = sf.fit_latents(field, x, z0, points, backend="torch", **settings)
    want = sf.fit_latents(field.double(), x.double(), z0.double(), points.double(), **settings)
    eps = torch.finfo(torch.float32).eps
    for mine, torchs, exact in zip(found[:3], plain[:3], want[:3], strict=True):
        lost = (torchs - exact).abs().max()
        assert (mine - exact).abs().max() <= 2 * lost + 16 * eps * exact.abs().max()
