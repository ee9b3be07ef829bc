"""Cases of one layer with the activation in front: the fused kernel, and the library's product.

`LAYERS` are the paper's decoder's, by what `fastsfvae.ops.dispatch.decide` asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure import Case, Prepared
from bench.problems import products, relative_error, rotations
from fastsfvae.jacobian.rules.jet import fold
from fastsfvae.ops.convolution import Geometry, convolve, convolve_backward
from fastsfvae.ops.dispatch import layer_key
from fastsfvae.ops.tangent_activation import stack_activation, stack_activation_backward
from fastsfvae.ops.tangent_layer import Layer, stack_layer, stack_layer_backward

OPERATION = "tangent_conv_transpose relu"
LIBRARY = "activation kernel + library"
# By the product of float32 numbers that the kernel forms.
FUSED = {product: f"fused, {product}" for product in ("ieee", "tf32x3", "tf32")}
HALF = "fused"
DTYPES = ("tf32", "float32", "bfloat16")
GEOMETRY = Geometry((2, 2), (1, 1), (1, 1), 1, True, (0, 0))
CHECKED = 1


class Size(NamedTuple):
    """A transposed convolution with kernel 4 and stride 2 in a decoder."""

    m: int
    batch: int
    channels_in: int
    channels_out: int
    height: int

    def key(self, product: str) -> str:
        """Its name in the table of what was measured."""
        x = self.channels_in, self.height, self.height
        return layer_key(
            "conv_transpose2d", x, (self.channels_in, self.channels_out, 4, 4), product
        )


LAYERS = {
    "deconv2": Size(16, 64, 64, 64, 4),
    "deconv3": Size(16, 64, 64, 32, 8),
    "deconv4": Size(16, 64, 32, 32, 16),
    "deconv5": Size(16, 64, 32, 3, 32),
}
# Tests the benchmark, measures nothing.
TINY = {"tiny": Size(2, 2, 4, 3, 3)}


def implementations(dtype: str) -> dict[str, Layer | None]:
    """Who computes a layer in "tf32", "float32" or "bfloat16": a fused layer, or the library."""
    of_dtype = {"tf32": ("tf32",), "float32": ("ieee", "tf32x3")}.get(dtype, ())
    fused = {FUSED[product]: Layer(GEOMETRY, "relu", product=product) for product in of_dtype}
    return {**(fused or {HALF: Layer(GEOMETRY, "relu")}), LIBRARY: None}


def label(name: str) -> str:
    """A layer as a row's shape names it."""
    m, B, C_in, C_out, height = (LAYERS | TINY)[name]
    return f"{name} m={m} B={B} {C_in}x{height}x{height} to {C_out}"


def layers(
    device: str, names: Sequence[str] = tuple(LAYERS), dtypes: Sequence[str] = DTYPES
) -> Iterator[Case]:
    """Forward and backward of each layer by each implementation; all of them use Triton."""
    for name in names:
        for dtype in dtypes:
            for implementation, fused in implementations(dtype).items():
                for backward in (False, True):
                    yield _case(device, name, dtype, implementation, fused, backward)


def _run(
    fused: Layer | None, backward: bool, stack: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    if fused is not None:
        if not backward:
            return (stack_layer(fused, stack, weight, None),)
        pulled, grad_w, _ = stack_layer_backward(fused, grad, stack, weight, (True, True, False))
        assert pulled is not None and grad_w is not None
        return pulled, grad_w
    # A sweep overwrites the stack with this; here the next round needs it.
    moved = stack_activation(stack[0], stack[1:], "relu", ())
    if not backward:
        return (convolve(fold(moved), weight, GEOMETRY).unflatten(0, stack.shape[:2]),)
    grad_x, grad_w = convolve_backward(fold(grad), fold(moved), weight, GEOMETRY, (True, True))
    assert grad_x is not None and grad_w is not None
    pulled = grad_x.unflatten(0, stack.shape[:2])
    pulled = stack_activation_backward(moved[0], None, pulled[0], pulled[1:], "relu", ())
    return pulled, grad_w


def _case(
    device: str, name: str, dtype: str, implementation: str, fused: Layer | None, backward: bool
) -> Case:
    m, B, C_in, C_out, height = (LAYERS | TINY)[name]
    of_numbers = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    positions = (1 + m) * B * height * height
    # X and Y once; backwards, both products read the gradient, and the stack twice.
    passes = (3 * C_in + 2 * 4 * C_out) if backward else (C_in + 4 * C_out)
    traffic = positions * passes * of_numbers.itemsize

    def draw(*shape: int) -> Tensor:
        t = torch.randn(*shape, device=device, dtype=of_numbers).flatten(0, -4)
        return t.contiguous(memory_format=torch.channels_last).unflatten(0, shape[:-3])

    def prepare() -> Prepared:
        sets = [
            (
                draw(1 + m, B, C_in, height, height),
                draw(C_in, C_out, 4, 4) / 8,
                draw(1 + m, B, C_out, 2 * height, 2 * height),
            )
            for _ in range(rotations(traffic, device))
        ]

        def run(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
            with products(dtype):
                return _run(fused, backward, *tensors)

        def error(outputs: tuple[Tensor, ...]) -> float:
            # Some samples' outputs and gradients; the weight's sums over all, and has its tests.
            stack, weight, grad = sets[0]
            x = stack[:, :CHECKED].double().requires_grad_()
            weight, grad = weight.double(), grad[:, :CHECKED].double()
            moved = torch.cat([x[:1].relu(), (x[:1] > 0) * x[1:]])
            out = convolve(fold(moved), weight, GEOMETRY).unflatten(0, x.shape[:2])
            want = out if not backward else torch.autograd.grad(out, x, grad)[0]
            return relative_error([outputs[0][:, :CHECKED]], [want.detach()])

        return Prepared([lambda s=s: run(s) for s in sets], error)

    return Case(
        *(OPERATION, implementation, "backward" if backward else "forward"),
        *(label(name), dtype),
        prepare,
        bytes=traffic,
        flops=(2 if backward else 1) * 2 * positions * C_in * C_out * 16,
        launches=("graph",),
    )
