"""tangent_linear: with and without axes between batch and features, against float64."""

import pytest
import torch
import torch.nn.functional as F

from fastsfvae.ops.tangent_layer import Layer, stack_layer, stack_layer_backward
from tests._triton import assert_as_good, requires_triton
from tests.kernels.stack_layers import ACTIVATIONS, assert_layer, draw, run, supports

# ((m, B, *), C_in, C_out)
SHAPES = [((1, 1), 1, 1), ((2, 5), 7, 40), ((33, 3), 96, 5), ((2, 3, 4), 5, 3), ((1, 2), 64, 70)]


def problem(lead, C_in, C_out, dtype=torch.float32):
    stack, weight, bias = draw(0, dtype, (1 + lead[0], *lead[1:], C_in), (C_out, C_in), (C_out,))
    (grad,) = draw(1, dtype, (*stack.shape[:-1], C_out))
    return stack, weight, bias, grad


class TestKernel:
    pytestmark = requires_triton

    @pytest.mark.parametrize("kind", ["relu", "tanh"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_sizes(self, shape, kind, poisoned_empty):
        assert_layer(None, kind, F.linear, problem(*shape))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_between_activations(self, shape, poisoned_empty):
        assert_layer(None, "relu", F.linear, problem(*shape), behind="leaky_relu")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_aligned_sizes(self, dtype, poisoned_empty):
        # Whole blocks of channels and columns, three blocks of rows, four steps or more.
        inputs = problem((15, 12), 256, 64, dtype)
        assert_layer(None, "relu", F.linear, inputs, "tf32", behind="relu")

    @pytest.mark.parametrize("kind", ACTIVATIONS)
    def test_bfloat16(self, kind, poisoned_empty):
        assert_layer(None, kind, F.linear, problem((3, 4), 20, 9, torch.bfloat16))

    @pytest.mark.parametrize("product", ["ieee", "tf32x3", "tf32"])
    def test_float32_products(self, product):
        assert_layer(None, "tanh", F.linear, problem((3, 20), 40, 24), product)

    def test_float32_of_a_half_stack(self, poisoned_empty):
        stack, weight, bias, grad = problem((2, 3, 4), 20, 9, torch.bfloat16)
        room = torch.full_like(stack, torch.nan, dtype=torch.float32)
        out = stack_layer(Layer(), stack, weight, bias, torch.float32)
        stack_layer_backward(Layer(), grad, stack, weight, out=room)
        double = [t.double() for t in (stack, weight, bias, grad)]
        of_slot = F.pad(bias.double()[None], (0, 0, 0, len(stack) - 1)).view(len(stack), 1, 1, -1)
        for got, (x, w) in ((out, double[:2]), (room, (double[3], double[1].mT))):
            want = F.linear(x, w) + (of_slot if got is out else 0)
            scale = F.linear(x.abs(), w.abs()).max() + bias.abs().max()
            assert_as_good(got, want, want.float(), scale)

    def test_any_layout_gives_the_same_bits_twice(self):
        stack, weight, bias, grad = problem((33, 3), 20, 5)
        turned = [t.mT.contiguous().mT for t in (stack, weight)]
        runs = [run(None, "silu", *pair, bias, grad) for pair in ((stack, weight), turned)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_supports_names_what_the_kernels_take():
    assert supports(None, (3, 2, 4), (6, 4))
    assert supports(None, (3, 2, 7, 4), (6, 4))
    assert not supports(None, (3, 2, 4), (6, 4), torch.float64)
    assert not supports(None, (2**11, 2**10, 2**10, 4), (6, 4))
