"""tangent_conv: strides 1 and 2, kernels 1, 3 and 4, against float64."""

from functools import partial

import pytest
import torch

from tests._triton import requires_triton
from tests.kernels.stack_layers import assert_layer, image_problem, run, square, supports

geometry = partial(square, stride=1)
# (kernel, stride, padding)
LAYERS = [(1, 1, 0), (1, 1, 1), (3, 1, 1), (3, 1, 0), (4, 1, 2), (3, 2, 1), (4, 2, 1)]
# (m, B, C_in, C_out, H, W)
SHAPES = [(2, 2, 3, 5, 5, 4), (1, 1, 1, 1, 4, 5), (33, 1, 1, 2, 4, 3), (1, 2, 96, 40, 3, 4)]


class TestKernel:
    pytestmark = requires_triton

    @pytest.mark.parametrize("kind", ["hardtanh", "sigmoid"])
    @pytest.mark.parametrize("kernel, stride, padding", LAYERS)
    def test_geometries(self, kernel, stride, padding, kind, poisoned_empty):
        g = geometry(stride=stride, padding=padding)
        assert_layer(g, kind, *image_problem(g, *SHAPES[0], kernel))

    @pytest.mark.slow
    @pytest.mark.parametrize("product", ["ieee", "tf32x3", "tf32"])
    def test_float32_products(self, product):
        g = geometry(stride=2)
        assert_layer(g, "tanh", *image_problem(g, 3, 2, 20, 12, 6, 8, 4), product)

    @pytest.mark.parametrize("kernel, stride", [(3, 1), (4, 2)])
    @pytest.mark.parametrize("shape", SHAPES[1:])
    def test_sizes(self, shape, kernel, stride, poisoned_empty):
        g = geometry(stride=stride)
        assert_layer(g, "relu", *image_problem(g, *shape, kernel))

    @pytest.mark.parametrize("kind", ["none", "silu"])
    def test_bfloat16(self, kind, poisoned_empty):
        g = geometry()
        assert_layer(g, kind, *image_problem(g, *SHAPES[0], 3, torch.bfloat16))

    @pytest.mark.parametrize("kernel, stride, padding", LAYERS)
    def test_between_activations(self, kernel, stride, padding, poisoned_empty):
        g = geometry(stride=stride, padding=padding)
        assert_layer(g, "relu", *image_problem(g, *SHAPES[0], kernel), behind="leaky_relu")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kernel, stride", [(3, 1), (4, 2), (3, 2)])
    def test_aligned_sizes(self, kernel, stride, dtype, poisoned_empty):
        # Whole blocks of channels and columns, three blocks of rows.
        g = geometry(stride=stride)
        inputs = image_problem(g, 2, 2, 32, 64, 8 * stride, 8 * stride, kernel, dtype)
        assert_layer(g, "leaky_relu", *inputs, "tf32", behind="relu")

    def test_two_runs_give_the_same_bits(self):
        _, inputs = image_problem(geometry(), *SHAPES[2], 3)
        runs = [run(geometry(), "tanh", *inputs) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_supports_names_what_the_kernels_take():
    def asked(shape=(3, 2, 4, 5, 5), weight=(6, 4, 3, 3), dtype=torch.float32, **options):
        return supports(geometry(**options), shape, weight, dtype)

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
