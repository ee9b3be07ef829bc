"""Where reverse mode over PyTorch's forward mode gives wrong gradients, ours are right."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from fastsfvae.jacobian.api import decode_with_jacobian
from tests.jacobian.test_rules import compare

M = 3
NORMS = {
    "layer_norm": lambda: (nn.LayerNorm(6), (6,)),
    "instance_norm": lambda: (nn.InstanceNorm1d(2), (2, 3)),
    "group_norm": lambda: (nn.GroupNorm(2, 4), (4, 3)),
    "rms_norm": lambda: (nn.RMSNorm(6), (6,)),
}


def build(name):
    torch.manual_seed(1)
    norm, shape = NORMS[name]()
    size = int(torch.tensor(shape).prod())
    layers = [nn.Linear(M, size), nn.Unflatten(1, shape), norm, nn.Flatten(), nn.Linear(size, 5)]
    return nn.Sequential(*layers).double()


def gradient(module, z, jacobian):
    functional = (jacobian.sin() + jacobian.square()).sum()
    return torch.autograd.grad(functional, module[0].weight)[0]


@pytest.mark.parametrize("name", NORMS)
def test_gradients_of_the_jacobian(name):
    module, z = build(name), torch.randn(4, M, dtype=torch.float64)
    compare(module, z)
    ours = gradient(module, z, decode_with_jacobian(module, z)[1])
    oracle = gradient(module, z, decode_with_jacobian(module, z, backend="reference")[1])
    torch.testing.assert_close(ours, oracle, rtol=1e-9, atol=1e-11)
    forward = torch.func.vmap(torch.func.jacfwd(lambda s: module(s[None])[0]))(z)
    error = (gradient(module, z, forward.mT) - oracle).norm() / oracle.norm()
    # Not asserted: a PyTorch that has been fixed is welcome.
    print(f"{name}: relative error of the gradient through torch.func.jacfwd {error:.1e}")
    if error > 1e-6:
        warnings.warn(
            f"torch.func.jacfwd's gradient through {name} is off by {error:.2f}", stacklevel=1
        )
