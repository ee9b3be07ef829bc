"""The weight's gradient: aligned sizes, as decoders have them, and odd ones, against float64."""

import pytest
import torch
import torch.nn.functional as F

from bench.problems import products
from fastsfvae.kernels import audit
from fastsfvae.kernels._launch import DeviceLimits, device_limits, pretend
from fastsfvae.kernels._stack_back import configuration, takes
from fastsfvae.kernels._stack_geometry import POINTWISE, Front, window
from fastsfvae.kernels._stack_layer import layer_bwd
from fastsfvae.kernels._stack_walk import split_walk, walk_of
from fastsfvae.kernels.tangent_conv_transpose import geometry
from tests._triton import INTERPRETER, assert_as_good, requires_triton
from tests.kernels.stack_layers import ACTIVATIONS, draw, moved, weight_gradient

# Gathers by kernel, stride and padding.
DOUBLING, SAME, HALVING = (4, 2, 1), (3, 1, 1), (3, 2, 1)
RELU = Front("relu", applied=True)


def gradient(plain, windowed, kernel, stride, padding):
    """The sum by autograd: of <plain, conv(windowed, w)> in w, as ``[M, taps, C]``."""
    M, C = plain.shape[-1], windowed.shape[-1]
    w = torch.zeros(M, C, kernel, kernel, dtype=plain.dtype, device=plain.device)
    w.requires_grad_()
    images = windowed.flatten(0, 1).movedim(-1, 1)
    out = F.conv2d(images, w, None, stride, padding)
    (g,) = torch.autograd.grad(out, w, plain.flatten(0, 1).movedim(-1, 1))
    return g.permute(0, 2, 3, 1).reshape(M, kernel**2, C)


def problem(S, B, grid, M, C, of, dtype=torch.float32):
    """Random stacks whose window `of` has its positions on the grid."""
    kernel, stride, padding = of
    size = tuple(stride * (n - 1) + kernel - 2 * padding for n in grid)
    return draw(0, dtype, (S, B, *grid, M), (S, B, *size, C))


def check(plain, windowed, of, kind="none", on_window=False, product="ieee", applied=False):
    """Compare with float64 and with plain PyTorch; returns the gradient."""
    phi, params = ACTIVATIONS[kind]
    front = Front(kind, params, product, applied)
    gather = POINTWISE if of == (1, 1, 0) else window(*of)
    result = plain if on_window else windowed
    columns = result.shape[-1]
    got, of_bias = weight_gradient(
        plain, windowed, gather, front, on_window=on_window, bias_size=columns
    )
    rows = result[0].reshape(-1, columns)
    assert_as_good(
        of_bias,
        rows.double().sum(0),
        rows.float().sum(0),
        rows.double().abs().sum(0).max(),
    )

    def expected(p, q):
        if kind != "none" and not applied:
            p, q = (p, moved(phi, q)) if on_window else (moved(phi, p), q)
        return p, q

    inputs = [t.double().requires_grad_() for t in (plain, windowed)]
    p, q = (t.detach() for t in expected(*inputs))
    want, scale = gradient(p, q, *of), gradient(p.abs(), q.abs(), *of)
    with products(product):
        mine = expected(*(t.clone().requires_grad_() for t in (plain, windowed)))
        rough = gradient(*(t.detach() for t in mine), *of)
    assert got.dtype == torch.float32
    # Sums are float32 whatever the dtype; the operands' rounding is that of an activation alone.
    eps = torch.finfo(plain.dtype).eps if kind != "none" and not applied else None
    # The interpreter truncates operands as tensor cores do.
    eps = 2**-10 if product == "tf32" else eps
    assert_as_good(got, want, rough, scale.max(), eps)
    return got


class TestKernel:
    pytestmark = requires_triton

    # (S, B, grid, M, C): whole tiles as in decoders, three tiles of positions or more, several
    # parts; several images to a block, and a block that they do not fill.
    ALIGNED = [
        (2, 2, (16, 16), 32, 32),
        (3, 1, (8, 8), 64, 32),
        (3, 3, (4, 4), 64, 64),
    ]
    ODD = [
        (2, 2, (5, 3), 3, 5),
        (1, 1, (1, 1), 1, 1),
        (2, 1, (7, 9), 20, 40),
        (5, 1, (2, 3), 70, 6),
    ]

    # What sets the halves apart, their conversions, does not depend on the shape.
    @pytest.mark.parametrize("capability", [89, 90])
    @pytest.mark.parametrize(
        "shape, dtype",
        [
            *((shape, torch.float32) for shape in ALIGNED),
            *((shape, torch.bfloat16) for shape in ALIGNED[:2]),
            (ALIGNED[2], torch.float16),
        ],
    )
    def test_aligned(self, shape, dtype, capability, poisoned_empty):
        pair = problem(*shape, DOUBLING, dtype)
        with pretend(DeviceLimits(8, capability)):
            check(*pair, DOUBLING)

    # Rows that fill neither the last tile nor the last product, windows in tiles of columns, and
    # images that do not fill a block.
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "shape, of",
        [((2, 45, (1, 1), 196, 388), (1, 1, 0)), ((3, 3, (5, 4), 100, 64), DOUBLING)],
    )
    @pytest.mark.parametrize("dtype, rows", [(torch.float32, 64), (torch.bfloat16, 128)])
    def test_wide_tiles(self, shape, of, dtype, rows, poisoned_empty):
        pair = problem(*shape, of, dtype)
        product = "tf32" if dtype == torch.float32 else "ieee"
        with pretend(DeviceLimits(8, 90)):
            walk = walk_of(
                *(pair[0].shape, pair[1].shape, dtype, POINTWISE if of[0] == 1 else window(*of)),
                *(Front(precision=product), device_limits(pair[0])),
                on_window=False,
            )
            assert (walk.tile.block_m, walk.tile.block_m * walk.tile.block_n) == (rows, 16384)
            check(*pair, of, product=product)

    @pytest.mark.parametrize("of", [DOUBLING, SAME, HALVING, (4, 1, 1)])
    @pytest.mark.parametrize("shape", ODD)
    def test_odd(self, shape, of, poisoned_empty):
        check(*problem(*shape, of), of)

    # (S, B, grid, M, C) of a linear layer, a convolution with kernel 1, and one that is padded.
    @pytest.mark.parametrize(
        "shape, padding",
        [((2, 90, (1, 1), 70, 130), 0), ((1, 3, (5, 4), 9, 20), 0), ((2, 2, (5, 4), 9, 20), 1)],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_tap(self, shape, padding, dtype, poisoned_empty):
        of = (1, 1, padding)
        check(*problem(*shape, of, dtype), of)

    @pytest.mark.parametrize("kind", [kind for kind in ACTIVATIONS if kind != "none"])
    @pytest.mark.parametrize("grid", [(4, 4), (3, 3), (1, 1)])
    @pytest.mark.parametrize("on_window", [False, True])
    @pytest.mark.parametrize("dtype, capability", [(torch.float32, 89), (torch.bfloat16, 90)])
    def test_activation_in_front(self, kind, on_window, grid, dtype, capability, poisoned_empty):
        of = (1, 1, 0) if grid == (1, 1) else SAME
        with pretend(DeviceLimits(4, capability)):
            check(*problem(3, 5, grid, 8, 12, of, dtype), of, kind, on_window)

    @pytest.mark.parametrize("on_window", [False, True])
    def test_an_applied_activation_is_not_applied_again(self, on_window):
        pair = problem(2, 3, (4, 4), 8, 12, SAME)
        got = check(*pair, SAME, "relu", on_window, applied=True)
        assert torch.equal(got, check(*pair, SAME, "none", on_window))

    @pytest.mark.parametrize("product", ["ieee", "tf32x3", "tf32"])
    def test_float32_products(self, product):
        check(*problem(2, 2, (4, 4), 64, 32, DOUBLING), DOUBLING, product=product)

    @pytest.mark.parametrize("on_window", [False, True])
    def test_without_a_bias(self, on_window):
        pair = problem(2, 3, (4, 4), 8, 12, SAME)
        got, of_bias = weight_gradient(*pair, window(*SAME), Front(), on_window=on_window)
        assert of_bias is None and torch.equal(got, check(*pair, SAME, on_window=on_window))

    @pytest.mark.slow
    def test_two_runs_give_the_same_bits_on_any_number_of_multiprocessors(self):
        pair = problem(3, 2, (8, 8), 32, 32, DOUBLING, torch.bfloat16)
        for count in (1, 8, 132):
            with pretend(DeviceLimits(count, 89)):
                first, again = (check(*pair, DOUBLING) for _ in range(2))
            assert torch.equal(first, again)

    def test_a_nan_stays_in_its_channel_and_taps(self):
        plain, windowed = problem(2, 2, (4, 4), 8, 12, SAME)
        windowed[1, 0, 0, 0, 3] = float("nan")
        spoiled, _ = weight_gradient(plain, windowed, window(*SAME), Front(), on_window=False)
        spoiled = spoiled.isnan()
        # The corner's pixel lies in the windows of four positions.
        assert spoiled.sum() == spoiled[:, [0, 1, 3, 4], 3].sum() == 4 * 8


class TestBothAtOnce:
    pytestmark = requires_triton

    @pytest.mark.parametrize(
        "kind, dtype, count",
        [("relu", torch.bfloat16, 5), ("none", torch.bfloat16, 1), ("relu", torch.float16, 1)],
    )
    def test_against_float64_and_two_kernels(self, kind, dtype, count, poisoned_empty):
        layer = geometry(4, padding=1)
        plain, windowed = problem(3, 2, (8, 8), 32, 32, DOUBLING, dtype)
        (weight,) = draw(2, dtype, (32, 32, 4, 4))
        stack, grad = (t.movedim(-1, 2) for t in (plain, windowed))
        front = Front(kind, applied=kind != "none")
        with pretend(DeviceLimits(count, 89)):
            assert takes(window(*DOUBLING), plain, windowed, front)
            got, again = (layer_bwd(layer, grad, stack, weight, front) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
        with pretend(DeviceLimits(count, 86)):
            assert not takes(window(*DOUBLING), plain, windowed, front)
            two = layer_bwd(layer, grad, stack, weight, front)
        slope = torch.ones_like(plain[:1]) if kind == "none" else (plain[:1] > 0).double()

        def of_data(g, w):
            pulled = F.conv2d(g.flatten(0, 1), w, None, 2, 1)
            return (pulled.movedim(1, -1).view(plain.shape) * slope).movedim(-1, 2)

        want = of_data(grad.double(), weight.double())
        scale = of_data(grad.double().abs(), weight.double().abs()).max()
        assert_as_good(got[0], want, two[0], scale)
        want, scale = (
            gradient(*(f(t.double()) for t in (plain, windowed)), *DOUBLING).view(32, 4, 4, 32)
            for f in (lambda t: t, torch.abs)
        )
        assert_as_good(got[1], want.permute(0, 3, 1, 2), two[1], scale.max())

    def test_takes_nothing_else(self):
        aligned = problem(2, 1, (8, 8), 32, 32, DOUBLING, torch.bfloat16)
        others = [
            problem(2, 1, (8, 8), 64, 32, DOUBLING, torch.bfloat16),
            problem(2, 1, (6, 6), 32, 32, DOUBLING, torch.bfloat16),
            problem(2, 1, (8, 8), 32, 32, HALVING, torch.bfloat16),
            problem(2, 1, (8, 8), 32, 32, DOUBLING),
        ]
        gather = window(*DOUBLING)
        with pretend(DeviceLimits(4, 89)):
            assert takes(gather, *aligned, Front()) and not takes(
                window(3, 2, 1), *aligned, Front()
            )
            assert not any(takes(gather, *pair, Front()) for pair in others)
            # An activation that is not applied yet.
            assert not takes(gather, *aligned, Front("relu"))


@pytest.mark.skipif(INTERPRETER, reason="compiles the same in either run of the suite")
def test_both_at_once_fits_the_card():
    row = audit.compile_configuration(configuration(16, 16, torch.bfloat16, RELU), 89)
    assert row.ok and row.tensor_core > 0 and row.shared_bytes <= 99 * 1024


@pytest.mark.parametrize("tiles", [1, 3, 8, 128])
@pytest.mark.parametrize("steps", [1, 5, 64, 1088])
@pytest.mark.parametrize("most", [0, 1, 7, 128, 264])
def test_parts_cover_all_steps_and_fill_the_device(tiles, steps, most):
    per_group, per_split = split_walk(tiles, steps, most)
    parts = -(-tiles // per_group) * -(-steps // per_split)
    assert 1 <= per_group <= tiles and 1 <= per_split <= steps
    assert parts <= max(1, most) and (parts == 1 or 4 * parts <= tiles * steps)
    # What the busiest part does is near its share.
    if tiles * steps >= 16 * most > 0:
        assert per_group * per_split <= 1.35 * tiles * steps / most
