"""Where gradients of Jacobians that PyTorch makes forward are wrong, ours are right."""

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


def double_backward(module, z):
    """J [B, m, n] by the double-backward trick: the transpose of the transpose."""
    directions = torch.eye(M, dtype=z.dtype)
    jvp = torch.autograd.functional.jvp
    columns = [jvp(module, z, v.expand_as(z), create_graph=True)[1] for v in directions]
    return torch.stack(columns, 1)


@torch.no_grad()
def differences(module, z, step=1e-5):
    """What `gradient` is of reverse mode's J, by central differences."""
    weight = module[0].weight
    result = torch.empty_like(weight)
    for index in range(weight.numel()):
        values = []
        for shift in (step, -step):
            before = weight.view(-1)[index].item()
            weight.view(-1)[index] = before + shift
            jacobian = decode_with_jacobian(module, z, backend="reference")[1]
            values.append((jacobian.sin() + jacobian.square()).sum())
            weight.view(-1)[index] = before
        result.view(-1)[index] = (values[0] - values[1]) / (2 * step)
    return result


@pytest.mark.parametrize("name", NORMS)
def test_gradients_by_double_backward(name):
    module, z = build(name), torch.randn(4, M, dtype=torch.float64)
    oracle = differences(module, z)
    ours = gradient(module, z, decode_with_jacobian(module, z)[1])
    torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-6)
    # Not asserted either.
    try:
        theirs = gradient(module, z, double_backward(module, z))
    except RuntimeError as reason:
        print(f"{name}: no gradient by double backward: {reason}")
        return
    error = (theirs - oracle).norm() / oracle.norm()
    print(f"{name}: relative error of the gradient by double backward {error:.1e}")
    if error > 1e-6:
        message = f"double backward's gradient through {name} is off by {error:.2f}"
        warnings.warn(message, stacklevel=1)


@pytest.mark.parametrize("name", ["prelu", "cdist"])
def test_the_reference_does_without_vmap_where_that_is_wrong(name):
    """Held to finite differences: PyTorch 2.14's vmap over jacrev gives another J for these."""
    torch.manual_seed(1)
    centres = torch.randn(8, 4, dtype=torch.float64)
    shape = nn.Linear(M, 8), nn.Unflatten(1, (2, 4))
    last = {"prelu": nn.PReLU(2), "cdist": Distances(centres)}[name]
    module = nn.Sequential(*shape, last, nn.Flatten()).double()
    z = torch.randn(6, M, dtype=torch.float64)
    units = torch.eye(M, dtype=torch.float64)
    differences = [(module(z + 1e-6 * e) - module(z - 1e-6 * e)) / 2e-6 for e in units]
    for backend in ("torch", "reference"):
        jacobian = decode_with_jacobian(module, z, backend=backend)[1]
        torch.testing.assert_close(jacobian, torch.stack(differences, 1), rtol=1e-7, atol=1e-7)


class Distances(nn.Module):
    def __init__(self, centres):
        super().__init__()
        self.centres = nn.Parameter(centres)

    def forward(self, h):
        return torch.cdist(h, self.centres)
