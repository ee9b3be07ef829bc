"""tangent_conv: strides 1 and 2, kernels 1, 3 and 4, against float64."""

import pytest
import torch
import torch.nn.functional as F

from fastsfvae.ops.convolution import Geometry
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

# (kernel, stride, padding)
LAYERS = [(1, 1, 0), (1, 1, 1), (3, 1, 1), (3, 1, 0), (4, 1, 2), (3, 2, 1), (4, 2, 1)]
# (m, B, C_in, C_out, H, W)
SHAPES = [(2, 2, 3, 5, 5, 4), (1, 1, 1, 1, 4, 5), (33, 1, 1, 2, 4, 3), (1, 2, 96, 40, 3, 4)]


def geometry(stride=1, padding=1, groups=1, dilation=1):
    pair = lambda n: (n, n)  # noqa: E731
    return Geometry(pair(stride), pair(padding), pair(dilation), groups, False, (0, 0))


def problem(m, B, C_in, C_out, H, W, kernel, g, dtype=torch.float32):
    """A layer, and what it and its gradients are taken at."""

    def layer(x, weight):
        return F.conv2d(x, weight, None, g.stride, g.padding)

    stack, weight, bias = draw(
        0, dtype, (1 + m, B, C_in, H, W), (C_out, C_in, kernel, kernel), (C_out,)
    )
    (grad,) = draw(1, dtype, (1 + m, B, *layer(stack[0], weight).shape[1:]))
    return layer, (stack, weight, bias, grad)


def run(g, kind, stack, weight, bias, grad, product="ieee"):
    layer = Layer(g, kind, ACTIVATIONS[kind][1], product)
    out = stack_layer(layer, stack, weight, bias)
    assert out[0].is_contiguous(memory_format=torch.channels_last)
    return Results(out, *stack_layer_backward(layer, grad, stack, weight))


class TestKernel:
    pytestmark = requires_triton

    @pytest.mark.parametrize("kind", ["hardtanh", "sigmoid"])
    @pytest.mark.parametrize("kernel, stride, padding", LAYERS)
    def test_geometries(self, kernel, stride, padding, kind, poisoned_empty):
        g = geometry(stride, padding)
        layer, inputs = problem(*SHAPES[0], kernel, g)
        assert supports(g, *inputs[:2])
        assert_layer(run(g, kind, *inputs), ACTIVATIONS[kind][0], layer, *inputs)

    @pytest.mark.parametrize("product", ["ieee", "tf32x3", "tf32"])
    def test_float32_products(self, product):
        g = geometry(2, 1)
        layer, inputs = problem(3, 2, 20, 12, 6, 8, 4, g)
        with library_products(product) as eps:
            got = run(g, "tanh", *inputs, product)
            assert_layer(got, torch.tanh, layer, *inputs, eps)

    @pytest.mark.parametrize("kernel, stride", [(3, 1), (4, 2)])
    @pytest.mark.parametrize("shape", SHAPES[1:])
    def test_sizes(self, shape, kernel, stride, poisoned_empty):
        g = geometry(stride)
        layer, inputs = problem(*shape, kernel, g)
        assert_layer(run(g, "relu", *inputs), F.relu, layer, *inputs)

    @pytest.mark.parametrize("kind", ["none", "silu"])
    def test_bfloat16(self, kind, poisoned_empty):
        layer, inputs = problem(*SHAPES[0], 3, geometry(), torch.bfloat16)
        assert_layer(run(geometry(), kind, *inputs), ACTIVATIONS[kind][0], layer, *inputs)

    def test_two_runs_give_the_same_bits(self):
        _, inputs = problem(*SHAPES[2], 3, geometry())
        runs = [run(geometry(), "tanh", *inputs) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_supports_names_what_the_kernels_take():
    def asked(shape=(3, 2, 4, 5, 5), weight=(6, 4, 3, 3), dtype=torch.float32, **options):
        stack = torch.empty(shape, dtype=dtype, device="meta")
        return supports(geometry(**options), stack, torch.empty(weight, device="meta"))

    assert asked() and asked(stride=2) and asked(padding=2, weight=(6, 4, 4, 4))
    refused = [
        {"groups": 2},
        {"dilation": 2},
        {"stride": 3},
        {"stride": 2, "padding": 0},
        {"weight": (6, 4, 5, 5)},
        {"weight": (6, 4, 3, 1)},
        {"shape": (3, 2, 4, 5)},
        {"dtype": torch.float64},
        {"shape": (3, 2, 4, 2, 2), "padding": 0},
        {"shape": (2**15, 2**10, 4, 8, 8)},
    ]
    assert not any(asked(**options) for options in refused)
