"""Memory that an operation promises, and values that are only moved: against reverse mode."""

from __future__ import annotations

import pytest
import torch

from fastsfvae.jacobian.api import decode_with_jacobian
from fastsfvae.jacobian.rules.jet import Jet, from_stack
from fastsfvae.jacobian.rules.registry import RULES
from tests.jacobian.exactness import assert_right
from tests.jacobian.rule_cases import B, M, apply, decoder, with_linear
from tests.jacobian.test_rules import compare

R = torch.float64
CASES = {
    "contiguous_then_strides": apply(
        (3, 4), lambda h: h.mT.contiguous().as_strided((len(h), 4, 2), (12, 3, 1))
    ),
    "clone_then_strides": apply(
        (3, 4), lambda h: h.mT.clone().as_strided((len(h), 3, 2), (12, 4, 1))
    ),
    "clone_in_order_then_strides": apply(
        (3, 4),
        lambda h: h.mT.clone(memory_format=torch.contiguous_format).as_strided(
            (len(h), 4, 2), (12, 3, 1)
        ),
    ),
    "clone_of_a_slice_then_strides": apply(
        (3, 4), lambda h: h[:, :, 1:3].clone().as_strided((len(h), 5), (6, 1))
    ),
    "clone_expanded": apply(
        (3, 4), lambda h: h[:, :1].expand(-1, 5, -1).clone().view(-1, 20).square()
    ),
    "contiguous_between_channels_last": apply(
        (4, 6, 5),
        lambda h: (
            h.contiguous(memory_format=torch.channels_last).sin().contiguous().view(-1, 120)
            + h.clone(memory_format=torch.channels_last).flatten(1)
        ),
    ),
    "stacks": apply(
        (3, 4),
        lambda h: (
            torch.hstack([h, h.sin()])[:, :3]
            + torch.dstack([h, h * 2])[..., 1:5]
            + torch.column_stack([h, h.cos()])[:, 1:4]
        ),
    ),
    "stacks_trained": with_linear(
        lambda h, w, b: torch.hstack([h, b.expand(len(h), -1), w[:1].expand(len(h), -1)]).sin()
    ),
    "to_other": apply((12,), lambda h: h.to(h.sin()) * h.type_as(h.cos()) + h.expand_as(h * 2)),
    "addmm_scaled": with_linear(
        lambda h, w, b: (
            torch.addmm(b, h, w, beta=2, alpha=3)
            + torch.addmm(h, h, w, beta=0, alpha=2)
            + torch.addmm(h, h.sin(), w.t(), beta=3)
        )
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layout(name):
    torch.manual_seed(0)
    module, z = CASES[name](), torch.randn(B, M, dtype=R)
    compare(module, z)
    assert_right(module, z)


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (3, 2), (0.5, 1.5), (1, 0)])
def test_products_of_constants_beside_a_value(alpha, beta):
    def body(h):
        left = torch.linspace(-1, 1, 6, dtype=R).view(1, 3, 2).expand(len(h), -1, -1)
        right = torch.linspace(0, 1, 8, dtype=R).view(1, 2, 4).expand(len(h), -1, -1)
        return torch.baddbmm(h, left, right, beta=beta, alpha=alpha) + h

    module, z = decoder((3, 4), body), torch.randn(B, M, dtype=R)
    compare(module, z)
    assert_right(module, z)


@pytest.mark.parametrize("stacked", [True, False])
def test_contiguous_is_contiguous(stacked):
    """As what reads strides behind it expects."""
    stack = torch.randn(3, 4, 5, 2).transpose(2, 3)
    x = from_stack(stack) if stacked else Jet(stack[0], stack[1:])
    y = RULES["contiguous"].forward(x)
    assert y.primal.is_contiguous() and torch.equal(y.primal, stack[0])
    assert torch.equal(y.tangent, stack[1:])
    assert RULES["contiguous"].forward(y) is y


def test_clone_keeps_dense_memory_and_leaves_no_gaps():
    dense = torch.randn(4, 5, 2).transpose(1, 2)
    x = Jet(dense, torch.randn(3, 4, 2, 5))
    assert RULES["clone"].forward(x) is x
    for value in (torch.randn(4, 3, 5)[:, :, ::2], torch.randn(4, 1, 3).expand(-1, 3, -1)):
        y = RULES["clone"].forward(Jet(value, torch.zeros(2, 4, 3, 3)))
        assert y.primal.stride() == value.clone().stride() and torch.equal(y.primal, value)


def test_gradients_of_joined_parameters_share_no_memory():
    """At one sample both are parts of one gradient."""
    module = with_linear(lambda h, w, b: torch.cat([w[:1] * 1, w, b[None], h]).sum(0, True))()
    assert_right(module, torch.randn(1, M, dtype=R))


def test_views_of_bits_are_refused():
    module = apply((12,), lambda h: torch.view_as_real(h.view(torch.complex128)))()
    with pytest.raises(RuntimeError, match=r"bits of a value as torch\.complex128.*view_as_comp"):
        decode_with_jacobian(module, torch.randn(B, M, dtype=R))
