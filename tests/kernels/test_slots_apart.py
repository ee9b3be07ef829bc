"""Some samples of a larger stack, taken where they lie: what a copy of them gives, bit for bit."""

from collections import Counter

import pytest
import torch

from fastsfvae.kernels import _record, _stack_back, _stack_product, _stack_weight
from fastsfvae.kernels._contract import dense_slots, samples_apart
from fastsfvae.kernels._launch import DeviceLimits, pretend
from fastsfvae.kernels._machine_code import argument_at
from fastsfvae.kernels._stack_geometry import Front, doubling, window
from fastsfvae.kernels._stack_product import product
from fastsfvae.kernels.tangent_conv_transpose import (
    tangent_conv_transpose_bwd,
    tangent_conv_transpose_fwd,
)
from fastsfvae.ops.tangent_layer import Layer, stack_layer, stack_layer_backward
from tests._triton import INTERPRETER, requires_triton
from tests.kernels.stack_layers import ACTIVATIONS, draw, moved, square

UP, SAME, DOWN = square(2, transposed=True), square(1), square(2)
POINT, PIXEL = (square(1, padding=0, transposed=transposed) for transposed in (False, True))
UNTOUCHED = 7.0


def some_of_many(t, before, behind, fill=torch.nan):
    """The same numbers as samples of a larger stack, and the rest of that, filled."""
    shape = (len(t), before + t.shape[1] + behind, *t.shape[2:])
    images = t.ndim == 5
    many = torch.full(shape, fill, dtype=t.dtype, device=t.device)
    if images:
        many = many.movedim(2, -1).contiguous().movedim(-1, 2)
    few = many[:, before : before + t.shape[1]]
    few.copy_(t)
    assert samples_apart(few.movedim(2, -1) if images else few) == shape[1]
    return few, (many[:, :before], many[:, before + t.shape[1] :])


@pytest.fixture
def given(monkeypatch):
    """Where the stacks begin that launches are given."""
    starts = set()
    for module in (_stack_product, _stack_weight, _stack_back):
        original = module.launch

        def spy(*args, original=original, **options):
            starts.update(t.data_ptr() for t in args if torch.is_tensor(t) and t.ndim == 5)
            original(*args, **options)

        monkeypatch.setattr(module, "launch", spy)
    return starts


# Geometry, the activations in front and behind, whether the first one has been applied, the shapes
# of a sample and of the weight, and the dtype. Of slots apart an image at a time is walked over, or
# several; both kernels that double the size are here, and the one for what is curved.
CASES = {
    "doubling": (UP, "relu", "relu", True, (16, 4, 4), (16, 16, 4, 4), torch.float32),
    "odd": (UP, "relu", "leaky_relu", True, (5, 3, 2), (5, 7, 4, 4), torch.bfloat16),
    "narrow": (UP, "relu", "relu", True, (16, 4, 4), (16, 3, 4, 4), torch.float32),
    "curved": (UP, "tanh", "none", False, (5, 4, 4), (5, 6, 4, 4), torch.float32),
    "both": (UP, "relu", "relu", True, (32, 8, 8), (32, 32, 4, 4), torch.bfloat16),
    "same": (SAME, "silu", "none", False, (6, 4, 4), (5, 6, 3, 3), torch.float32),
    "down": (DOWN, "relu", "relu", True, (5, 6, 4), (8, 5, 3, 3), torch.float32),
    "pointwise": (POINT, "tanh", "none", False, (5, 3, 4), (6, 5, 1, 1), torch.float32),
    "pixel": (PIXEL, "relu", "relu", True, (9, 1, 1), (9, 3, 4, 4), torch.float32),
    "linear": (None, "relu", "relu", True, (3, 20), (9, 20), torch.bfloat16),
    "curved linear": (None, "tanh", "none", False, (3, 20), (9, 20), torch.float32),
}


@pytest.mark.parametrize("name", CASES)
class TestKernel:
    pytestmark = requires_triton

    @pytest.mark.slow
    def test_a_layer(self, name, given, poisoned_empty):
        geometry, kind, behind, applied, sample, shape, dtype = CASES[name]
        (phi, params), slots, samples = ACTIVATIONS[kind], 4, 3
        layer = Layer(geometry, kind, params, "tf32", applied, behind, ACTIVATIONS[behind][1])
        stack, weight = draw(0, dtype, (slots, samples, *sample), shape)
        bias = draw(1, dtype, (shape[1 if geometry and geometry.transposed else 0],))[0]
        stack = moved(phi, stack) if applied else stack
        # Parts of four images at least, so that slots begin within; and the card on which both
        # gradients may be one launch.
        with pretend(DeviceLimits(2, 89)):
            want = stack_layer(layer, stack, weight, bias)
            grad = draw(2, dtype, want.shape)[0]
            wants = stack_layer_backward(layer, grad, stack, weight)
            given.clear()
            x, _ = some_of_many(stack, 2, 1)
            g, _ = some_of_many(grad, 0, 1)
            room, others = some_of_many(torch.zeros_like(stack), 1, 4, UNTOUCHED)
            got = stack_layer(layer, x, weight, bias)
            of_x, of_weight, of_bias = stack_layer_backward(layer, g, x, weight, out=room)
        assert given == {t.data_ptr() for t in (x, g, room, got)}
        assert of_x.is_set_to(room) and all((t == UNTOUCHED).all() for t in others)
        for mine, other in zip((got, room, of_weight, of_bias), (want, *wants), strict=True):
            assert mine.isfinite().all() and torch.equal(mine, other)


class TestResult:
    pytestmark = requires_triton

    @pytest.mark.parametrize("columns", [3, 16])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("gather", [doubling(4), window(3, 1, 1)])
    def test_a_product_of_some_goes_among_others(self, gather, columns, dtype, poisoned_empty):
        # The tangents' slopes are read off the values that are there.
        front, size = Front("relu", applied=True, behind="relu"), 4 * gather.phases
        stack, weight = draw(0, dtype, (3, 5, 4, 4, 16), (16, gather.kernel**2, columns))
        options = {"inner_is_input": False, "bias": draw(1, dtype, (columns,))[0]}
        want = product(stack, weight, gather, (size, size), front, **options)
        room, others = some_of_many(torch.zeros_like(want).movedim(-1, 2), 2, 1, UNTOUCHED)
        room = room.movedim(2, -1)
        product(stack, weight, gather, (size, size), front, out=room, **options)
        assert want.abs().max() > 0 and torch.equal(room, want)
        assert all((t == UNTOUCHED).all() for t in others)


def test_what_may_lie_apart():
    stack = torch.zeros(3, 8, 4, 5)
    assert samples_apart(stack) == samples_apart(stack[:, :1]) == samples_apart(stack[:, 2:7]) == 8
    assert samples_apart(stack[:1, 2:7]) == 5 and dense_slots(stack[:, 2:7]).is_set_to(
        stack[:, 2:7]
    )
    # Samples that are not dense, slots upon one another, slots that lie no whole samples apart.
    others = stack[:, ::2], stack[..., :3], stack[:1].expand(3, 8, 4, 5)
    for other in (*others, stack.as_strided((3, 2, 4, 5), (50, 20, 5, 1))):
        assert samples_apart(other) is None and dense_slots(other).is_contiguous()


@pytest.mark.skipif(INTERPRETER, reason="launches are recorded, not interpreted")
def test_no_batch_and_no_distance_compiles_anything_anew():
    front, weight = Front("relu", applied=True, behind="relu"), torch.empty(16, 16, 4, 4)
    with _record.recorded(DeviceLimits(7, 90)) as launches:
        for samples, of in ((1, 2), (16, 64), (5, 9)):
            x, room = (torch.empty(3, of, 4, 4, 16).movedim(-1, 2)[:, :samples] for _ in range(2))
            y = tangent_conv_transpose_fwd(x, weight, None, front)
            tangent_conv_transpose_bwd(y, x, weight, front, out=room)
    found = Counter(launch.name for launch in launches)
    kernels = {launch.compilation for launch in launches}
    # The forward of values, then of tangents.
    assert found.pop("tangent_doubling_kernel") == 6 and len(kernels) == len(found) + 1 == 4
    assert set(found.values()) == {3}


def test_an_address_of_any_slot_is_the_stacks():
    many = torch.empty(3, 8, 2**12)
    few, other = many[:, 2:4], torch.empty(5)
    described = {name: _record._described(t) for name, t in (("x", few), ("y", other))}
    launch = _record.Launch(None, {}, {}, {}, {}, (1,), described)
    x, slot = described["x"], 4 * 8 * 2**12
    assert x.bytes == 4 * few.numel() and x.starts == tuple(x.address + i * slot for i in range(3))
    assert x.stop == x.address + 2 * slot + x.bytes // 3
    assert argument_at(launch, x.address + 2 * slot + 4) == "x"
    assert argument_at(launch, described["y"].address + 4) == "y" and not described["y"].starts
