"""tangent_conv_transpose: both geometries, behind each sort of activation, against float64."""

from functools import partial

import pytest
import torch

from fastsfvae.ops.tangent_layer import Layer, stack_layer, stack_layer_backward
from tests._triton import assert_as_good, requires_triton
from tests.kernels.stack_layers import (
    ACTIVATIONS,
    assert_layer,
    image_problem,
    moved,
    oracle,
    run,
    square,
    supports,
)

geometry = partial(square, stride=2, transposed=True)
# (m, B, C_in, C_out, H, W): 1, odd sizes, more than one block of channels, of columns and of rows.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 5, 3, 5, 3, 2),
    (33, 1, 1, 3, 2, 3),
    (1, 2, 96, 7, 2, 1),
    (2, 1, 32, 70, 1, 3),
]
PIXELS = [(2, 5, 9, 3, 1, 1), (33, 2, 1, 5, 1, 1), (1, 3, 64, 2, 1, 1)]


def problem(g, *shape, kernel=4, dtype=torch.float32):
    return image_problem(g, *shape, kernel, dtype)


class TestKernel:
    pytestmark = requires_triton

    # The largest shapes behind one that is curved alone: it reads what the other one reads.
    @pytest.mark.parametrize(
        "shape, kind", [*((shape, "tanh") for shape in SHAPES), *((s, "relu") for s in SHAPES[:2])]
    )
    def test_doubling(self, shape, kind, poisoned_empty):
        assert_layer(geometry(), kind, *problem(geometry(), *shape))

    @pytest.mark.parametrize("kind", ["relu", "tanh"])
    @pytest.mark.parametrize("shape", PIXELS)
    def test_one_pixel(self, shape, kind, poisoned_empty):
        g = geometry(stride=1, padding=0)
        assert_layer(g, kind, *problem(g, *shape))

    # Each shape between one of two pairs, the second between both.
    @pytest.mark.parametrize(
        "shape, kinds",
        [
            *zip(
                [*SHAPES, (64, 1, 2, 3, 1, 2)],
                3 * [("relu", "leaky_relu"), ("leaky_relu", "relu")],
                strict=True,
            ),
            (SHAPES[1], ("relu", "leaky_relu")),
        ],
    )
    def test_doubling_between_activations(self, shape, kinds, poisoned_empty):
        assert_layer(geometry(), kinds[0], *problem(geometry(), *shape), behind=kinds[1])

    @pytest.mark.parametrize("shape", PIXELS)
    def test_one_pixel_between_activations(self, shape, poisoned_empty):
        g = geometry(stride=1, padding=0)
        assert_layer(g, "none", *problem(g, *shape), behind="relu")

    @pytest.mark.parametrize("kernel, output_padding", [(3, 0), (3, 1), (4, 1)])
    def test_other_sizes_between_activations(self, kernel, output_padding, poisoned_empty):
        g = geometry(output_padding=output_padding)
        inputs = problem(g, 2, 2, 3, 2, 2, 3, kernel=kernel)
        assert_layer(g, "relu", *inputs, behind="relu")

    @pytest.mark.parametrize(
        "channels, kernel, dtype",
        [
            *(((64, 32), 4, dtype) for dtype in (torch.float32, torch.bfloat16)),
            *(((32, 64), 3, dtype) for dtype in (torch.float32, torch.float16)),
            *(((32, 3), 4, dtype) for dtype in (torch.float32, torch.bfloat16)),
        ],
    )
    def test_aligned_sizes(self, channels, kernel, dtype, poisoned_empty):
        # Whole blocks of channels and columns, three blocks of rows, four steps or more.
        inputs = problem(geometry(), 2, 2, *channels, 8, 8, kernel=kernel, dtype=dtype)
        assert_layer(geometry(), "relu", *inputs, "tf32", behind="leaky_relu")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", ACTIVATIONS)
    def test_activations(self, kind, dtype, poisoned_empty):
        assert_layer(geometry(), kind, *problem(geometry(), 3, 2, 5, 3, 2, 3, dtype=dtype))

    @pytest.mark.parametrize("kernel, output_padding", [(3, 0), (3, 1), (4, 1)])
    def test_other_sizes(self, kernel, output_padding, poisoned_empty):
        g = geometry(output_padding=output_padding)
        assert_layer(g, "sigmoid", *problem(g, 2, 2, 3, 2, 2, 3, kernel=kernel))

    @pytest.mark.parametrize("product", ["ieee", "tf32x3", "tf32"])
    def test_float32_products(self, product):
        assert_layer(geometry(), "tanh", *problem(geometry(), 2, 1, 20, 12, 3, 4), product)

    def test_any_layout_gives_the_same_bits_twice(self):
        g = geometry()
        _, (stack, weight, bias, grad) = problem(g, 33, 1, 3, 2, 3, 2)
        last = torch.channels_last
        folded = stack.flatten(0, 1).contiguous(memory_format=last).unflatten(0, stack.shape[:2])
        runs = [
            run(g, "silu", stack, weight, bias, grad),
            run(g, "silu", folded, weight.contiguous(memory_format=last), bias, grad),
        ]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_a_nan_stays_in_its_sample_and_tangent(self):
        _, (stack, weight, bias, grad) = problem(geometry(), 2, 3, 3, 2, 2, 2)
        stack[1, 2, 0, 0, 0] = float("nan")
        out, grad_stack, *_ = run(geometry(), "relu", stack, weight, bias, grad)
        spoiled = out.isnan().flatten(2).any(2)
        assert spoiled.sum() == spoiled[1, 2] == 1
        # ReLU has no second derivative: no gradient of the stack reads a tangent.
        assert grad_stack.isfinite().all()

    def test_a_nan_stays_in_its_sample_and_tangent_behind_an_activation(self):
        _, (stack, weight, bias, grad) = problem(geometry(), 2, 3, 3, 2, 2, 2)
        for slot, reached in ((1, [1]), (0, [0, 1, 2])):
            spoiled = stack.clone()
            spoiled[slot, 2, 0, 0, 0] = float("nan")
            out, *_ = run(geometry(), "relu", spoiled, weight, bias, grad, behind="relu")
            found = out.isnan().flatten(2).any(2)
            assert found[slot, 2] and found.sum() == found[reached, 2].sum()

    def test_two_runs_behind_an_activation_give_the_same_bits(self):
        _, inputs = problem(geometry(), 33, 1, 3, 2, 3, 2)
        runs = [run(geometry(), "relu", *inputs, "tf32", behind="relu") for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        # Ten bits of a mantissa are stored, so that nothing is left to truncate.
        for stored in (runs[0].out, runs[0].stack):
            assert not (stored.view(torch.int32) & 0x1FFF).any()

    def test_only_what_is_needed(self):
        layer = Layer(geometry(), "relu")
        _, (stack, weight, _, grad) = problem(geometry(), 1, 1, 2, 2, 2, 2)
        whole = stack_layer_backward(layer, grad, stack, weight)
        for i in range(3):
            needs = tuple(i == j for j in range(3))
            parts = stack_layer_backward(layer, grad, stack, weight, needs)
            assert [part is not None for part in parts] == list(needs)
            assert torch.equal(parts[i], whole[i])

    @pytest.mark.parametrize("shape", [(2, 3, 5, 3, 2, 3), (1, 2, 32, 3, 4, 4)])
    def test_float32_of_a_half_stack(self, shape, poisoned_empty):
        layer = Layer(geometry(), "relu", applied=True)
        plain, inputs = problem(geometry(), *shape, dtype=torch.bfloat16)
        inputs = moved(torch.relu, inputs[0]), *inputs[1:]
        stack, weight, bias, grad = inputs
        out = stack_layer(layer, stack, weight, bias, torch.float32)
        room = torch.full_like(stack.movedim(2, -1).contiguous(), torch.nan, dtype=torch.float32)
        room = room.movedim(-1, 2)
        assert stack_layer_backward(layer, grad, stack, weight, out=room)[0].is_set_to(room)
        want = oracle(lambda x: 1 * x, plain, *(t.double() for t in inputs))
        scale = oracle(lambda x: 1 * x, plain, *(t.double().abs() for t in inputs))
        pulled = torch.where(stack[:1] > 0, want.stack, 0)
        for got, exact, of in ((out, want.out, scale.out), (room, pulled, scale.stack)):
            assert_as_good(got, exact, exact.float(), of.max())

    def test_a_gradient_goes_where_it_is_wanted(self, poisoned_empty):
        layer = Layer(geometry(), "relu", applied=True)
        _, (stack, weight, _, grad) = problem(geometry(), 2, 2, 3, 2, 2, 3)
        want = stack_layer_backward(layer, grad[:1], stack[:1], weight)[0]
        room = torch.full_like(stack.movedim(2, -1).contiguous(), 7.0).movedim(-1, 2)
        stack_layer_backward(layer, grad[:1], stack[:1], weight, out=room[:1])
        assert torch.equal(room[:1], want) and (room[1:] == 7).all()
        with pytest.raises(ValueError, match="out has strides"):
            stack_layer_backward(layer, grad, stack, weight, out=torch.empty_like(stack))
        for wrong in (room[:1], room.double()):
            with pytest.raises(ValueError, match="or float32"):
                stack_layer_backward(layer, grad, stack, weight, out=wrong)

    def test_autocast_takes_its_dtype(self):
        layer = Layer(geometry(), "relu")
        _, (stack, weight, bias, _) = problem(geometry(), 1, 2, 3, 2, 2, 2)
        with torch.autocast(stack.device.type, torch.bfloat16):
            out = stack_layer(layer, stack, weight, bias)
        assert torch.equal(out, stack_layer(layer, stack.bfloat16(), weight, bias))

    def test_refuses_what_it_cannot_compute(self):
        g = geometry()
        _, (stack, weight, bias, _) = problem(g, 1, 1, 2, 2, 2, 2)
        with pytest.raises(ValueError, match="no float64 kernels"):
            stack_layer(Layer(g), stack.double(), weight, bias)
        with pytest.raises(ValueError, match="kind='mish' is not one of"):
            stack_layer(Layer(g, "mish"), stack, weight, bias)
        for layer in (Layer(g, "tanh", applied=True), Layer(g, behind="tanh")):
            with pytest.raises(ValueError, match="'tanh' does not tell its slope by its result"):
                stack_layer(layer, stack, weight, bias)


def test_supports_names_what_the_kernels_take():
    def asked(shape=(3, 2, 4, 5, 5), weight=(4, 6, 4, 4), dtype=torch.float32, **options):
        return supports(geometry(**options), shape, weight, dtype)

    assert asked() and asked(dtype=torch.bfloat16) and asked(weight=(4, 6, 3, 3), output_padding=1)
    pixel = {"shape": (3, 2, 4, 1, 1), "stride": 1, "padding": 0}
    assert asked(**pixel) and asked(**pixel, weight=(4, 6, 7, 5))
    refused = [
        {"groups": 2},
        {"dilation": 2},
        {"stride": 1},
        {"padding": 0},
        {"weight": (4, 6, 5, 5)},
        {"weight": (4, 6, 4, 3)},
        {"shape": (3, 2, 4, 5)},
        {"dtype": torch.float64},
        {**pixel, "output_padding": 1},
        # More positions than the kernels count, and more elements of one sample.
        {"shape": (2**15, 2**10, 4, 4, 4)},
        {"shape": (3, 2, 2**11, 2**10, 2**9), "weight": (2**11, 6, 4, 4)},
    ]
    assert not any(asked(**options) for options in refused)
