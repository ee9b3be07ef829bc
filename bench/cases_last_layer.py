"""Cases of a decoder's last layer together with the Gram of its Jacobian, as a loss asks for both.

Two ways, which `fastsfvae.ops.dispatch.decide` chooses between: `gram_tail`, on a stack behind the
activation that the layer before has applied; and the activation's kernel, the library's convolution
and `gram_project`. Both are given a stack, a weight, a bias and data, and leave G, p and rr in
parts for whoever solves, and what a backward wants; both then pull cotangents of these back to
stack, weight and bias.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.cases_layers import DTYPES as DTYPES
from bench.cases_layers import (
    LAYERS,
    TINY,
    Inputs,
    Size,
    convolution,
    draw,
    label,
    natively,
    type_of,
)
from bench.measure import Case, Prepared
from bench.problems import products, relative_error, rotations
from fastsfvae.gram.tail import Unwritten
from fastsfvae.gram.written import Written
from fastsfvae.jacobian.rules.jet import fold, from_stack
from fastsfvae.ops.convolution import convolve, convolve_backward
from fastsfvae.ops.gram_tail import Tail
from fastsfvae.ops.tangent_activation import stack_activation, stack_activation_backward

OPERATION = "last layer and Gram"
LIBRARY = "library + gram_project"
# By the product of float32 numbers that the kernels form.
FUSED = {product: f"gram_tail, {product}" for product in ("ieee", "tf32x3", "tf32")}
HALF = "gram_tail"
MODES = "forward", "backward"
LAST = {"deconv5": LAYERS["deconv5"]}
TINY_LAST = {"tiny": TINY["tiny"]._replace(behind="none")}


class Given(NamedTuple):
    """A layer's inputs, data, and cotangents of G + G^T, p and rr."""

    layer: Inputs
    x: Tensor
    M: Tensor
    u: Tensor
    g_rr: Tensor


def implementations(dtype: str) -> dict[str, str | None]:
    """Who takes a last layer in one of `DTYPES`: `gram_tail`, by its product, or the library."""
    of_dtype = {"tf32": ("tf32",), "float32": ("ieee", "tf32x3")}.get(dtype, ())
    fused: dict[str, str | None] = {FUSED[product]: product for product in of_dtype}
    return (fused or {HALF: "ieee"}) | {LIBRARY: None}


def last_layers(
    device: str, names: Sequence[str] = tuple(LAST), dtypes: Sequence[str] = DTYPES
) -> Iterator[Case]:
    """Forward and backward of each last layer by each implementation; all of them use Triton."""
    for dtype in dtypes:
        for name in names:
            for implementation, product in implementations(dtype).items():
                for mode in MODES:
                    yield _case(device, name, dtype, implementation, product, mode)


def traffic(size: Size, mode: str, itemsize: int) -> int:
    """Least bytes through device memory where the forward leaves J and r for the backward."""
    x, y, w = size.numbers
    n = y // (1 + size.m)
    kept = itemsize * (y - n) + 4 * n
    if mode == "forward":
        # Stack and data in.
        return itemsize * (x + w) + 4 * n + kept
    return kept + itemsize * (2 * x + w) + 4 * w


def flops(size: Size, mode: str) -> int:
    """Of the convolution and the Gram, or of both pullbacks: M J, u r^T and J^T u."""
    per_slot = 2 * (size.numbers[1] // (1 + size.m)) * size.m
    if mode == "forward":
        return size.flops + per_slot * (size.m + 1)
    return 2 * size.flops + per_slot * (size.m + 2)


def given(size: Size, dtype: str, device: str, seed: int) -> Given:
    """Random inputs, the same for each implementation and mode."""
    layer, g = draw(size, dtype, device, seed), torch.Generator(device).manual_seed(100 + seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device)

    B, m = size.batch, size.m
    x = make(*size.result_shape[1:]).contiguous(memory_format=torch.channels_last)
    half = make(B, m, m)
    # The library adds it in the stack's dtype.
    layer = layer._replace(bias=layer.bias.to(type_of(dtype)).float())
    return Given(layer, x, half + half.mT, make(B, m), make(B))


@functools.lru_cache(maxsize=1)
def exact(size: Size, dtype: str, device: str) -> dict[str, list[Tensor]]:
    """By mode, the results for the first inputs: plain torch in float64, all samples."""
    (front, _, weight, bias, _), x, *cotangents = given(size, dtype, device, 0)
    stack, weight, bias = (t.double().requires_grad_() for t in (front, weight, bias))
    moved = torch.cat([stack[:1].relu(), stack[1:] * (stack[:1] > 0)])
    with natively():
        y = convolution(fold(moved), weight, size.geometry).unflatten(0, stack.shape[:2])
        J = y[1:].transpose(0, 1).flatten(2)
        r = (x.double() - y[0] - bias.view(-1, 1, 1)).flatten(1)
        sums = J @ J.mT, (J @ r.unsqueeze(-1)).squeeze(-1), r.square().sum(-1)
        M, *others = (t.double() for t in cotangents)
        # M is the sum of G's cotangent and its transpose.
        grads = torch.autograd.grad(sums, (stack, weight, bias), (M / 2, *others))
    return {"forward": [t.detach() for t in sums], "backward": [*grads]}


def _by_kernels(size: Size, dtype: str, product: str, mode: str, of: Given) -> Callable[[], tuple]:
    layer, x, *cotangents = of
    whole = layer.weight.float()
    # The weight as a step has it, which makes it once for all of a sweep.
    tail = Tail(size.layer(dtype, product), layer.stack, whole, layer.bias, dense=layer.weight)
    if mode == "forward":
        return lambda: Unwritten(tail, x, of_data=False).parts().sums
    chunk = Unwritten(tail, x, of_data=False)
    chunk.parts()

    def pull() -> tuple[Tensor, ...]:
        pulled = chunk.pull(*cotangents)
        assert pulled.jet.stack is not None
        return pulled.jet.stack, *(gradient for _, gradient in pulled.others)

    return pull


def _by_library(size: Size, mode: str, of: Given) -> Callable[[], tuple]:
    (front, stack, weight, bias, _), x, *cotangents = of
    g, kind, lead = size.geometry, size.front, stack.shape[:2]

    def write(moved: Tensor) -> Written:
        y = convolve(fold(moved), weight, g).unflatten(0, lead)
        y[0].add_(bias.to(y.dtype).view(-1, 1, 1))
        return Written(from_stack(y), x, "triton")

    def forward() -> tuple[Tensor, ...]:
        # Of what it leaves there, a ReLU makes the same again.
        parts = write(stack_activation(front[0], front[1:], kind, (), out=front)).parts()
        assert parts is not None
        return parts.sums

    if mode == "forward":
        return forward
    chunk = write(stack)

    def pull() -> tuple[Tensor, ...]:
        grad = chunk.pull(*cotangents).jet.stack
        assert grad is not None
        grad_x, grad_w = convolve_backward(fold(grad), fold(stack), weight, g, (True, True))
        assert grad_x is not None and grad_w is not None
        pulled = grad_x.unflatten(0, lead)
        of_values = stack[0], None, pulled[0], pulled[1:], kind, ()
        pulled = stack_activation_backward(*of_values, out=pulled)
        return pulled, grad_w, grad[0].sum((0, 2, 3), dtype=torch.float32)

    return pull


def _case(
    device: str, name: str, dtype: str, implementation: str, product: str | None, mode: str
) -> Case:
    size = (LAST | TINY_LAST)[name]
    moved = traffic(size, mode, type_of(dtype).itemsize)

    def prepare() -> Prepared:
        runs = []
        for seed in range(rotations(moved, device)):
            of = given(size, dtype, device, seed)
            with products(dtype):
                if product is not None:
                    run = _by_kernels(size, dtype, product, mode, of)
                else:
                    run = _by_library(size, mode, of)
            runs.append(functools.partial(_with_products, dtype, run))

        def error(outputs: tuple[Tensor, ...]) -> float:
            summed = [t.double().sum(0) for t in outputs] if mode == "forward" else outputs
            return relative_error(summed, exact(size, dtype, device)[mode])

        return Prepared(runs, error)

    return Case(
        *(OPERATION, implementation, mode, label(name), dtype),
        prepare,
        bytes=moved,
        flops=flops(size, mode),
        launches=("graph",),
    )


def _with_products(dtype: str, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    with products(dtype):
        return run()
