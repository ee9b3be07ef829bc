"""Every tangent rule against reverse mode in float64: values, J, and gradients of both."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsfvae.jacobian.api import decode_with_jacobian
from tests.jacobian.rule_cases import CASES, ROW, B, M, through


def compare(module, z, *args, oracle=None, gradient=True, tolerance=1e-10):
    """J and a random functional's gradients against jacrev's, in float64."""
    z = z.clone().requires_grad_(gradient)
    leaves = [z, *module.parameters()]
    results = []
    for backend, decoder_ in (("torch", module), ("reference", oracle or module)):
        # PyTorch's fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            output, jacobian = decode_with_jacobian(decoder_, z, *args, backend=backend)
        generator = torch.Generator().manual_seed(7)
        functional = sum(
            (t * torch.randn(t.shape, dtype=t.dtype, generator=generator)).sum()
            + (t.square() * torch.randn(t.shape, dtype=t.dtype, generator=generator)).sum()
            for t in (output, jacobian)
        )
        grads = torch.autograd.grad(functional, leaves, allow_unused=True) if gradient else ()
        results.append((output, jacobian, grads))
    (y, J, g), (y0, J0, g0) = results
    assert y.shape == y0.shape and J.shape == J0.shape
    assert torch.equal(y, y0) or (y - y0).abs().max() <= tolerance * (1 + y0.abs().max())
    assert (J - J0).abs().max() <= tolerance * (1 + J0.abs().max())
    for ours, theirs in zip(g, g0, strict=True):
        ours = torch.zeros(()) if ours is None else ours
        theirs = torch.zeros(()) if theirs is None else theirs
        assert (ours - theirs).abs().max() <= tolerance * (1 + theirs.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_rule(name):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = CASES[name]()
        compare(module, torch.randn(B, M, dtype=torch.float64))


def test_hardsigmoid():
    """PyTorch's own cannot be differentiated twice."""
    module = through(ROW, nn.Hardsigmoid())()
    oracle = copy.deepcopy(module)
    oracle.body = lambda h, layer: F.relu6(h + 3) / 6
    z = torch.randn(B, M, dtype=torch.float64)
    with torch.no_grad():
        ours = decode_with_jacobian(module, z)
        theirs = decode_with_jacobian(oracle, z, backend="reference")
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, theirs, strict=True))


def test_old_weight_norm():
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(12, 5))
    module = through(ROW, layer)()
    compare(module, torch.randn(B, M, dtype=torch.float64))
