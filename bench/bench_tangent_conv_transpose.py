"""Transposed convolutions of the paper's decoder: `pytest bench/bench_tangent_conv_transpose.py`.

ReLU and the layer behind it, fused, against the activation's kernel and the library's convolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench.measure import Case, Prepared
from bench.peers import TRITON
from bench.problems import relative_error, rotations
from bench.suite import DEVICE, given
from fastsfvae.jacobian.jet import fold
from fastsfvae.ops.convolution import Geometry, convolve, convolve_backward
from fastsfvae.ops.tangent_activation import stack_activation, stack_activation_backward
from fastsfvae.ops.tangent_layer import Layer, stack_layer, stack_layer_backward

LIBRARY = "activation kernel + library"
# m, B, C_in, C_out and the input's height and width.
LAYERS = {
    "deconv2": (16, 64, 64, 64, 4),
    "deconv3": (16, 64, 64, 32, 8),
    "deconv4": (16, 64, 32, 32, 16),
    "deconv5": (16, 64, 32, 3, 32),
}
GEOMETRY = Geometry((2, 2), (1, 1), (1, 1), 1, True, (0, 0))
FUSED = Layer(GEOMETRY, "relu")
CHECKED = 1


def cases(device: str, names: Sequence[str], dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Forward and backward of each layer, by either implementation; both need a GPU."""
    if device == "cpu":
        return
    for name in names:
        for dtype in dtypes:
            for backward in (False, True):
                for implementation in (TRITON, LIBRARY):
                    yield _case(device, name, dtype, backward, implementation)


def _run(
    implementation: str, backward: bool, stack: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    if implementation == TRITON:
        if not backward:
            return (stack_layer(FUSED, stack, weight, None),)
        return stack_layer_backward(FUSED, grad, stack, weight, (True, True, False))[:2]
    # A sweep overwrites the stack with this; here the next round needs it.
    moved = stack_activation(stack[0], stack[1:], "relu", ())
    if not backward:
        return (convolve(fold(moved), weight, GEOMETRY).unflatten(0, stack.shape[:2]),)
    grad_x, grad_w = convolve_backward(fold(grad), fold(moved), weight, GEOMETRY, (True, True))
    assert grad_x is not None and grad_w is not None
    pulled = grad_x.unflatten(0, stack.shape[:2])
    pulled = stack_activation_backward(moved[0], None, pulled[0], pulled[1:], "relu", ())
    return pulled, grad_w


def _case(device: str, name: str, dtype: torch.dtype, backward: bool, implementation: str) -> Case:
    m, B, C_in, C_out, size = LAYERS[name]
    positions = (1 + m) * B * size * size
    # X and Y once; backwards, both products read the gradient, and the stack twice.
    passes = (3 * C_in + 2 * 4 * C_out) if backward else (C_in + 4 * C_out)
    traffic = positions * passes * dtype.itemsize

    def draw(*shape: int) -> Tensor:
        t = torch.randn(*shape, device=device, dtype=dtype).flatten(0, -4)
        return t.contiguous(memory_format=torch.channels_last).unflatten(0, shape[:-3])

    def prepare() -> Prepared:
        sets = [
            (
                draw(1 + m, B, C_in, size, size),
                draw(C_in, C_out, 4, 4) / 8,
                draw(1 + m, B, C_out, 2 * size, 2 * size),
            )
            for _ in range(rotations(traffic, device))
        ]

        def error(outputs: tuple[Tensor, ...]) -> float:
            # Some samples' outputs and gradients; the weight's sums over all, and has its tests.
            stack, weight, grad = sets[0]
            x = stack[:, :CHECKED].double().requires_grad_()
            weight, grad = weight.double(), grad[:, :CHECKED].double()
            moved = torch.cat([x[:1].relu(), (x[:1] > 0) * x[1:]])
            out = convolve(fold(moved), weight, GEOMETRY).unflatten(0, x.shape[:2])
            want = out if not backward else torch.autograd.grad(out, x, grad)[0]
            return relative_error([outputs[0][:, :CHECKED]], [want.detach()])

        runs = [lambda s=s: _run(implementation, backward, *s) for s in sets]
        return Prepared(runs, error)

    return Case(
        *("tangent_conv_transpose relu", implementation, "backward" if backward else "forward"),
        f"{name} m={m} B={B} {C_in}x{size}x{size} to {C_out}",
        str(dtype).removeprefix("torch."),
        prepare,
        bytes=traffic,
        flops=(2 if backward else 1) * 2 * positions * C_in * C_out * 16,
        launches=("graph",),
    )


@given(
    cases(DEVICE, ["deconv3"], [torch.bfloat16]),
    full=cases(DEVICE, list(LAYERS), [torch.float32, torch.bfloat16]),
)
def test_tangent_conv_transpose(timed, case):
    timed(case)
