"""A small model in float64, and the densities of its formulae written out."""

import math

import torch
from torch import nn
from torch.distributions import Normal

B, M, N, K, C = 6, 3, 5, 4, 0.3


def normal(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fill(module, std, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return module.double()


class Encoder(nn.Module):
    def __init__(self, m=M):
        super().__init__()
        self.layer = nn.Linear(N, 2 * m)

    def forward(self, x):
        return self.layer(x).chunk(2, -1)


def model():
    decoder = nn.Sequential(nn.Linear(M, 8), nn.Tanh(), nn.Linear(8, N))
    return fill(Encoder(), 0.5), fill(decoder, 0.5, seed=1), normal(2, B, N)


def close(actual, expected, scale=64):
    """So many units in the last place of the largest number, or of 1."""
    torch.testing.assert_close(
        actual,
        expected,
        rtol=0,
        atol=scale * torch.finfo(torch.float64).eps * max(1.0, float(expected.abs().max())),
    )


def standard(like):
    return Normal(torch.zeros_like(like), 1.0)


def posterior(mean, log_var):
    return Normal(mean, (0.5 * log_var).exp())


def log_density(decoder, x, z):
    return Normal(decoder(z), math.sqrt(C)).log_prob(x).sum(-1)


def same_gradients(loss, expected, *modules, scale=256):
    parameters = [p for module in modules for p in module.parameters()]
    found, wanted = (
        torch.autograd.grad(value, parameters, retain_graph=True) for value in (loss, expected)
    )
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 0
        close(one, other, scale)
