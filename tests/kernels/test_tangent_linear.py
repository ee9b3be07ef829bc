"""tangent_linear: with and without axes between batch and features, against float64."""

import pytest
import torch
import torch.nn.functional as F

from fastsfvae.ops.tangent_layer import Layer, stack_layer, stack_layer_backward
from tests._triton import poisoned_empty, requires_triton
from tests.kernels.stack_layers import (
    ACTIVATIONS,
    Results,
    assert_layer,
    draw,
    library_products,
    supports,
)

# pytest finds the fixture by its name in this module.
_ = poisoned_empty

# ((m, B, *), C_in, C_out)
SHAPES = [((1, 1), 1, 1), ((2, 5), 7, 40), ((33, 3), 96, 5), ((2, 3, 4), 5, 3), ((1, 2), 64, 70)]


def problem(lead, C_in, C_out, dtype=torch.float32):
    stack, weight, bias = draw(0, dtype, (1 + lead[0], *lead[1:], C_in), (C_out, C_in), (C_out,))
    (grad,) = draw(1, dtype, (*stack.shape[:-1], C_out))
    return stack, weight, bias, grad


def run(kind, stack, weight, bias, grad, product="ieee"):
    layer = Layer(None, kind, ACTIVATIONS[kind][1], product)
    out = stack_layer(layer, stack, weight, bias)
    return Results(out, *stack_layer_backward(layer, grad, stack, weight))


class TestKernel:
    pytestmark = requires_triton

    @pytest.mark.parametrize("kind", ["relu", "tanh"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_sizes(self, shape, kind, poisoned_empty):
        inputs = problem(*shape)
        assert supports(None, *inputs[:2])
        assert_layer(run(kind, *inputs), ACTIVATIONS[kind][0], F.linear, *inputs)

    @pytest.mark.parametrize("kind", ACTIVATIONS)
    def test_bfloat16(self, kind, poisoned_empty):
        inputs = problem((3, 4), 20, 9, torch.bfloat16)
        assert_layer(run(kind, *inputs), ACTIVATIONS[kind][0], F.linear, *inputs)

    @pytest.mark.parametrize("product", ["ieee", "tf32x3", "tf32"])
    def test_float32_products(self, product):
        inputs = problem((3, 20), 40, 24)
        with library_products(product) as eps:
            got = run("tanh", *inputs, product)
            assert_layer(got, torch.tanh, F.linear, *inputs, eps)

    def test_any_layout_gives_the_same_bits_twice(self):
        stack, weight, bias, grad = problem((33, 3), 20, 5)
        turned = [t.mT.contiguous().mT for t in (stack, weight)]
        runs = [run("silu", *pair, bias, grad) for pair in ((stack, weight), turned)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_supports_names_what_the_kernels_take():
    weight = torch.empty(6, 4, device="meta")
    assert supports(None, torch.empty(3, 2, 4, device="meta"), weight)
    assert supports(None, torch.empty(3, 2, 7, 4, device="meta"), weight)
    assert not supports(None, torch.empty(3, 2, 4, device="meta", dtype=torch.float64), weight)
    assert not supports(None, torch.empty(2**11, 2**10, 2**10, 4, device="meta"), weight)
