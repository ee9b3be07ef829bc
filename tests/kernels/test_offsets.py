"""Offsets beyond 2^31 elements, in memory of which only what is read and written exists.

Where a tensor's tangents lie far apart the launcher itself runs. Of a layer's stack that is too
large to compute only the last program runs, and must do what the last program of a small one does.
"""

import mmap

import pytest
import torch

from fastsfvae.kernels import (
    _stack_product,
    _stack_walk,
    _stack_weight,
    latent_layer,
    tangent_conv,
    tangent_conv_transpose,
    tangent_linear,
)
from fastsfvae.kernels._launch import DeviceLimits, pretend
from fastsfvae.kernels._stack_geometry import Front, doubling, window
from fastsfvae.kernels._stack_product import product
from fastsfvae.kernels.tangent_activation import tangent_activation_bwd, tangent_activation_fwd
from tests._triton import INTERPRETER
from tests.kernels.stack_layers import weight_gradient
from tests.kernels.test_gram_tail import problem, run

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETER, reason="runs one program, which only the interpreter can"),
]
# Not reserved, where the system's heuristic would refuse more than there is memory.
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000


@pytest.fixture(autouse=True)
def nothing_is_copied_back(monkeypatch):
    """Tensors are on the CPU: the interpreter would copy all of their memory onto itself."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)


def hollow(shape, dtype, strides=None):
    """Zeros in memory that begins to exist where it is written."""
    count = torch.Size(shape).numel()
    if strides is not None:
        count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    room = mmap.mmap(-1, count * dtype.itemsize, flags=_FLAGS)
    flat = torch.frombuffer(room, dtype=dtype, count=count)
    return flat.view(shape) if strides is None else flat.as_strided(shape, strides)


def far_apart(t):
    """Its leading slices, as dense as they are, 2^30 elements apart."""
    return hollow(t.shape, t.dtype, (2**30, *t.stride()[1:])).copy_(t)


@pytest.mark.slow
def test_a_tail_whose_tangents_lie_far_apart():
    tail, x, cotangents = problem(2, 3, 4, 3, 2, 3, "silu", "sigmoid")
    stack = tail.stack.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    stack = stack.unflatten(0, tail.stack.shape[:2])
    far = far_apart(stack)
    assert far[3].storage_offset() > 2**31
    near, away = (run(tail._replace(stack=t), x, cotangents) for t in (stack, far))
    assert all(torch.equal(a, b) for a, b in zip(near, away, strict=True))


def test_an_activation_whose_tangents_lie_far_apart():
    a, T, g_out, g_T = (torch.randn(shape) for shape in ((2, 9), (4, 2, 9), (2, 9), (4, 2, 9)))
    far_T, far_g = far_apart(T), far_apart(g_T)
    out_T, g_T_in = far_apart(torch.zeros_like(T)), far_apart(torch.zeros_like(T))
    near = tangent_activation_fwd(a, T, "silu")
    away = tangent_activation_fwd(a, far_T, "silu", out_T=out_T)
    near += tangent_activation_bwd(a, T, g_out, g_T, "silu")
    away += tangent_activation_bwd(a, far_T, g_out, far_g, "silu", g_T_in=g_T_in)
    assert all(torch.equal(first, second) for first, second in zip(near, away, strict=True))


LAYERS = {
    "up": (tangent_conv_transpose, (16, 16, 4, 4), Front("relu", applied=True, behind="relu"), {}),
    "narrow": (tangent_conv_transpose, (16, 3, 4, 4), Front("relu", applied=True), {}),
    "same": (tangent_conv, (16, 16, 3, 3), Front("tanh"), {"padding": 1}),
    "linear": (tangent_linear, (16, 16), Front("relu"), {}),
    "both": (tangent_conv_transpose, (32, 32, 4, 4), Front("relu", applied=True), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_whose_slots_lie_far_apart(name):
    module, shape, front, options = LAYERS[name]
    of = module.__name__.rpartition(".")[2]
    forward, backward = (getattr(module, f"{of}_{half}") for half in ("fwd", "bwd"))
    g = torch.Generator().manual_seed(0)
    dtype, linear = torch.bfloat16, module is tangent_linear
    weight = torch.randn(shape, generator=g).to(dtype)

    def draw(channels, size):
        images = torch.randn((4, 1, size, size, channels), generator=g).to(dtype)
        return images.flatten(2, 3) if linear else images.movedim(-1, 2)

    x, extent = draw(shape[0], 8), 8 if module is not tangent_conv_transpose else 16
    with pretend(DeviceLimits(4, 89)):
        near = forward(x, weight, None, front, **options)
        grad = draw(near.shape[-1] if linear else near.shape[2], extent)
        nears = backward(grad, x, weight, front, **options)
        far, far_grad, room = (far_apart(t) for t in (x, grad, torch.zeros_like(x)))
        assert far[3].storage_offset() > 2**31
        away = forward(far, weight, None, front, **options)
        aways = backward(far_grad, far, weight, front, out=room, **options)
    assert near.abs().max() > 0 and torch.equal(near, away) and aways[0].is_set_to(room)
    assert all(torch.equal(a, b) for a, b in zip(nears, aways, strict=True))


@pytest.fixture
def last_program(monkeypatch):
    """Run the last program of every launch alone, in hollow memory; others are left out."""

    def wrapped(kernel):
        class LastOnly:
            def __getitem__(self, grid):
                def launch(*args, **kwargs):
                    from triton.runtime.interpreter import interpreter_builder

                    original = type(interpreter_builder).create_get_program_id

                    def last(builder, axis):
                        builder.grid_idx = (grid[0] - 1, 0, 0)
                        return original(builder, axis)

                    with monkeypatch.context() as patch:
                        patch.setattr(type(interpreter_builder), "create_get_program_id", last)
                        kernel[(1,)](*args, **kwargs)

                return launch

        return LastOnly()

    empty = torch.empty

    def hollow_empty(shape, *, dtype, device):
        if torch.Size(shape).numel() > 2**28:
            return hollow(shape, dtype)
        return empty(shape, dtype=dtype, device=device).zero_()

    monkeypatch.setattr(torch, "empty", hollow_empty)
    for module, name in (
        (_stack_product, "tangent_product_kernel"),
        (_stack_product, "tangent_doubling_kernel"),
        (_stack_weight, "tangent_weight_kernel"),
        (latent_layer, "_latent_layer_fwd_kernel"),
        (latent_layer, "_latent_layer_bwd_kernel"),
        (latent_layer, "_latent_layer_sum_kernel"),
    ):
        monkeypatch.setattr(module, name, wrapped(getattr(module, name)))


# One sample of 8 x 8 positions fills a block of rows: 2^31 elements are 2^21 samples, two slots.
SIZE, CHANNELS, MANY = 8, 16, 2**20 + 3


def stacks(dtype=torch.float32):
    """A small stack of two slots and one sample, and one of many whose last samples are that."""
    g = torch.Generator().manual_seed(0)
    small = torch.randn((2, 1, SIZE, SIZE, CHANNELS), generator=g).to(dtype)
    large = hollow((2, MANY, SIZE, SIZE, CHANNELS), dtype)
    large[:, -1:] = small
    assert large.numel() > 2**31
    return small, large


BETWEEN = Front("relu", applied=True, behind="relu")


@pytest.mark.parametrize("front", [Front("relu"), Front("tanh"), BETWEEN])
@pytest.mark.parametrize("pulled", [False, True])
def test_the_last_rows_of_a_layer(front, pulled, last_program):
    weight = torch.randn(CHANNELS, 9, CHANNELS, generator=torch.Generator().manual_seed(1))
    layer, results = (window(3, 1, 1), (SIZE, SIZE), front), []
    for stack in stacks():
        options = {"inner_is_input": True, "pull": stack if pulled else None}
        results.append(product(stack, weight, *layer, **options)[-1, -1])
    assert results[0].abs().max() > 0 and torch.equal(*results)


@pytest.mark.parametrize("front", [Front("relu"), BETWEEN])
def test_the_last_rows_of_a_layer_that_doubles(front, last_program):
    weight = torch.randn(CHANNELS, 16, CHANNELS, generator=torch.Generator().manual_seed(1))
    layer = doubling(4), (2 * SIZE, 2 * SIZE), front
    near, away = (
        product(stack, weight, *layer, inner_is_input=False)[-1, -1] for stack in stacks()
    )
    assert near.abs().max() > 0 and torch.equal(near, away)


@pytest.mark.parametrize("on_window", [False, True])
def test_the_last_rows_of_a_weights_gradient(on_window, last_program, monkeypatch):
    # The second of two parts is the last sample.
    monkeypatch.setattr(_stack_walk, "split_walk", lambda tiles, steps, _: (tiles, steps - 1))
    near, away = (
        weight_gradient(stack, stack, window(3, 1, 1), Front("tanh"), on_window=on_window)[0]
        for stack in stacks()
    )
    assert near.abs().max() > 0 and torch.equal(near, away)


def test_the_last_samples_of_a_layer_of_the_latents(last_program):
    g = torch.Generator().manual_seed(0)
    weight, bias, z = (torch.randn(shape, generator=g) for shape in ((64, 2), (64,), (3, 2)))
    grad, many = torch.randn((3, 3, 64), generator=g), 2**24 + 3
    assert 3 * many * 64 > 2**31
    results = []
    for count in (3, many):
        latents, gradient = hollow((count, 2), z.dtype), hollow((3, count, 64), z.dtype)
        latents[-3:], gradient[:, -3:] = z, grad
        stack = latent_layer.latent_layer_fwd(latents, weight, bias, "silu")
        # The last program adds up the gradient of the last samples.
        of_z, _, _ = latent_layer.latent_layer_bwd(gradient, latents, weight, bias, "silu")
        results.append((stack[:, -3:], of_z[-3:]))
    for near, away in zip(*results, strict=True):
        assert near.abs().max() > 0 and torch.equal(near, away)
