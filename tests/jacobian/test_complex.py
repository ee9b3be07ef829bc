"""Complex values with complex tangents: values, J and every gradient against reverse mode."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.utils import _pytree as pytree

from fastsfvae.jacobian.api import decode_with_jacobian
from fastsfvae.jacobian.plan import build as plans
from fastsfvae.jacobian.plan.nodes import packet_name
from fastsfvae.jacobian.rules.catalogue import COMPLEX
from fastsfvae.jacobian.run.cache import Linearizer
from tests.jacobian import complex_cases, fourier_cases
from tests.jacobian.complex_cases import GRID, HOLOMORPHIC, R, on, on_real, parts
from tests.jacobian.exactness import TOLERANCE, loss_and_gradients
from tests.jacobian.rule_cases import B, M
from tests.jacobian.test_rules import compare

CASES = {**complex_cases.CASES, **fourier_cases.CASES}


def latents():
    return torch.randn(B, M, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def check(module, *, oracle=None):
    """Values, J and autograd's gradients; then the sweep's, in chunks of every size."""
    z = latents()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no tangent rule.*")
        compare(module, z, oracle=oracle)
        want, exact = loss_and_gradients(oracle or module, z, "reference")
        scale = max(1.0, *(float(g.abs().max()) for g in exact))
        for chunk_size in range(1, B + 1):
            got, gradients = loss_and_gradients(module, z, "torch", chunk_size=chunk_size)
            assert abs(got - want) <= TOLERANCE * max(1.0, abs(float(want)))
            for ours, theirs in zip(gradients, exact, strict=True):
                assert torch.isfinite(theirs).all(), "the oracle is no oracle here"
                assert float((ours - theirs).abs().max()) <= TOLERANCE * scale
    assert Linearizer(module, z).plan(B).obstacles == []


@pytest.mark.parametrize("name", CASES)
def test_complex(name):
    check(CASES[name]())


def operations_on_complex_values(module, monkeypatch):
    """The operations of a decoder with a complex argument or result that carries tangents."""
    found = set()
    build = plans.build_plan

    def noting(trace, *args):
        plan = build(trace, *args)
        for node in trace.module.graph.nodes:
            values = pytree.tree_leaves([n.meta.get("val") for n in (node, *node.all_input_nodes)])
            known = isinstance(node.target, torch._ops.OpOverload)
            if known and any(isinstance(v, torch.Tensor) and v.is_complex() for v in values):
                found.add(packet_name(node.target))
        return plan

    monkeypatch.setattr(plans, "build_plan", noting)
    Linearizer(module, latents()).plan(B)
    monkeypatch.undo()
    return found


@pytest.mark.slow
def test_every_operation_is_tested(monkeypatch):
    tested = set()
    for build in CASES.values():
        tested |= operations_on_complex_values(build(), monkeypatch)
    assert COMPLEX <= tested


@pytest.mark.parametrize(
    ("function", "name"),
    [(lambda u: u.logsumexp(2), "logsumexp"), (torch.acosh, "acosh")],
)
def test_others_are_refused(function, name):
    with pytest.raises(RuntimeError, match=rf"aten\.{name}.*on complex values") as caught:
        Linearizer(on(GRID, function)(), latents()).plan(B)
    assert "\n" not in str(caught.value)


def test_polar_of_a_negative_modulus():
    """PyTorch's derivative by it has the wrong sign."""
    module = on_real((2, 6), lambda h: torch.polar(h[:, 0] - 1, h[:, 1]))()
    oracle = copy.copy(module)
    oracle.body = lambda h: parts((h[:, 0] - 1) * torch.exp(1j * h[:, 1]))
    check(module, oracle=oracle)


@pytest.mark.parametrize(("sizes", "strides"), [((2, 2), (6, 1, 3)), ((3, 2), (6, 1, 3))])
def test_views_by_strides(sizes, strides):
    def swapped(u):
        return torch.as_strided(u.mT.contiguous(), [len(u), *sizes], strides).exp()

    check(on((2, 3), swapped)())


@pytest.mark.parametrize("name", HOLOMORPHIC)
def test_derivatives_all_over_the_plane(name):
    """Against differences: PyTorch's formulas take the wrong branch of some roots (acosh)."""
    function = getattr(torch, name)
    z = 2 * torch.randn(64, 2, dtype=R, generator=torch.Generator().manual_seed(1))

    def decode(z):
        return parts(function(torch.complex(z[:, :1], z[:, 1:]))).flatten(1)

    jacobian = decode_with_jacobian(decode, z)[1]
    for axis in range(2):
        step = 1e-5 * torch.eye(2, dtype=R)[axis]
        differences = (decode(z + step) - decode(z - step)) / 2e-5
        error = (jacobian[:, axis] - differences).abs() / (1 + differences.abs())
        assert float(error.max()) < 1e-6
