"""Noise and samples that are not decoded one by one are refused; what only looks like it is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsfvae.jacobian.api import decode_with_jacobian
from tests.jacobian.exactness import assert_right

B, M = 4, 3


class Decoder(nn.Module):
    def __init__(self, function, *layers):
        super().__init__()
        self.lift, self.function, self.layers = nn.Linear(M, 8), function, nn.ModuleList(layers)

    def forward(self, z, *args):
        return self.function(self.lift(z), *self.layers, *args).flatten(1)


def decoder(function, *layers):
    torch.manual_seed(0)
    return Decoder(function, *layers).double().eval()


def latents(batch=B):
    return torch.randn(batch, M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rows(h):
    return torch.arange(h.shape[0])


MIXES = {
    "mean": lambda h: h - h.mean(0),
    "weak": lambda h: h + 1e-4 * h.mean(0),
    "sum of all": lambda h: h / h.sum(),
    "maximum of all": lambda h: h - h.max(),
    "softmax": lambda h: h.softmax(0),
    "sort": lambda h: h.sort(0).values,
    "places of a sort": lambda h: h * h.argsort(0),
    "cumsum": lambda h: h.cumsum(0),
    "cumsum from the end": lambda h: h.flip(0).cumsum(0).flip(0),
    "roll": lambda h: h.roll(1, 0),
    "roll by three": lambda h: h.roll(3, 0),
    "flip": lambda h: h.flip(0),
    "product": lambda h: h @ (h.t() @ h),
    "first": lambda h: h - h[:1],
    "second": lambda h: h - h[1],
    "last": lambda h: h - h[-1],
    "std": lambda h: h / h.std(0),
    "norm": lambda h: F.normalize(h, dim=0),
    "halves": lambda h: h.view(2, -1).roll(1, 0).view(-1, 8),
    "attention": lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
    "index": lambda h: h[rows(h).flip(0)],
    "convolution over the batch": lambda h: (
        F.conv1d(h.t()[:, None], h.new_ones(1, 1, 3), None, 1, 1).squeeze(1).t()
    ),
    "pairs": lambda h: torch.cdist(h, h)[:, :2],
}
DRAWS = {
    "randn_like": lambda h: h + torch.randn_like(h),
    "randn": lambda h: h + torch.randn(8, dtype=h.dtype),
    "rand times a constant": lambda h: h * (1 + 0 * torch.rand(())),
    "normal_": lambda h: h + torch.empty_like(h).normal_(),
    "uniform_": lambda h: h + torch.zeros_like(h).uniform_(),
    "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.5)),
    "multinomial": lambda h: h * torch.multinomial(h.softmax(1), 1),
    "poisson": lambda h: h + torch.poisson(h.exp()),
    "permutation": lambda h: h[:, torch.randperm(8)],
    "integers": lambda h: h[:, torch.randint(0, 8, (8,))],
    "gumbel": lambda h: F.gumbel_softmax(h),
    "dropout": lambda h: F.dropout(h),
    "dropout in place": lambda h: F.dropout(2 * h, inplace=True),
    "alpha dropout": lambda h: F.alpha_dropout(h, training=True),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "a sample": lambda h: torch.distributions.Normal(h, 1.0, validate_args=False).rsample(),
}
KEEPS = {
    "transposed": lambda h: h.t().softmax(0).t(),
    "time first": lambda h: h.view(-1, 2, 4).transpose(0, 1).cumsum(0).transpose(0, 1),
    "folded": lambda h: h.reshape(-1, 4).tanh().reshape(-1, 8),
    "windows": lambda h: h.view(-1, 2, 4).softmax(2).roll(1, 1),
    "groups": lambda h: F.conv1d(
        h.reshape(1, -1, 4), h.new_ones(2 * h.shape[0], 1, 3), groups=2 * h.shape[0]
    ).view(-1, 4),
    "unused": lambda h: (h.mean(0), h + torch.zeros(8, dtype=h.dtype))[1],
    "dropout in evaluation": lambda h: F.dropout(h, training=False),
    "in place": lambda h: F.dropout(2 * h, training=False, inplace=True),
}


@pytest.mark.parametrize("name", MIXES)
def test_samples_that_mix(name):
    with pytest.raises(RuntimeError, match=r"^decoder mixes the samples of a batch \(aten\.\w+"):
        decode_with_jacobian(decoder(MIXES[name]), latents())


@pytest.mark.parametrize("name", DRAWS)
def test_noise(name):
    with pytest.raises(RuntimeError, match=r"^decoder draws at random .*aten|in training mode"):
        decode_with_jacobian(decoder(DRAWS[name]), latents())


@pytest.mark.parametrize("name", KEEPS)
def test_samples_that_only_seem_to_mix(name):
    assert_right(decoder(KEEPS[name]), latents(), swept=name != "groups")


def test_the_module_is_named():
    class Centre(nn.Module):
        def forward(self, h):
            return h - h.mean(0)

    module = nn.Sequential(nn.Linear(M, 8), nn.Sequential(nn.ReLU(), Centre())).double()
    with pytest.raises(RuntimeError, match=r"^decoder\[1\]\[1\] mixes"):
        decode_with_jacobian(module, latents())


def test_inputs_that_mix():
    """What each sample is given must be its own as well."""
    module = decoder(lambda h, label: h + label.softmax(0))
    with pytest.raises(RuntimeError, match="mixes the samples"):
        decode_with_jacobian(module, latents(), torch.rand(B, 8, dtype=torch.float64))


@pytest.mark.parametrize("function", [lambda h: h * h.shape[0], lambda h: h / h.numel()])
def test_the_size_of_the_batch_is_no_value(function):
    with pytest.raises(RuntimeError, match="depends on how many samples"):
        decode_with_jacobian(decoder(function), latents())


def test_a_sample_alone_mixes_with_nobody():
    module = decoder(lambda h: h * h.softmax(0))
    jacobian = decode_with_jacobian(module, latents(1))[1]
    torch.testing.assert_close(jacobian[0], module.lift.weight.t())


def test_the_search_changes_nothing():
    """Neither state nor the generator, nor buffers that a forward writes into."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)).train()
    module = decoder(lambda h, layer: layer(h), layer)
    module.layers.train()
    twin = decoder(lambda h, layer: layer(h), layer)
    twin.load_state_dict(module.state_dict())
    before, state = latents(), torch.get_rng_state()
    decode_with_jacobian(module, before)
    assert torch.equal(torch.get_rng_state(), state)
