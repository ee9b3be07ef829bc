"""Cases of one layer with the activation in front: the fused kernel, and the library's product.

Each is launched as a step launches it, and compiled once for both. The fused ones: the layer before
has applied the activation in front, and the layer itself applies the one behind as it stores. The
library's: the activation in front is a pass of its own, which overwrites the stack; so the backward
finds that, too, behind the activation. A layer on 1 x 1 has nothing in front, as the layer of the
latents takes that in; the library's product there is one of matrices, and its convolution beside.

`LAYERS` are the paper's decoder's, by what `fastsfvae.ops.dispatch.decide` asks for them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Case, Prepared
from bench.problems import products, relative_error, rotations
from bench.tf32 import rounded
from fastsfvae.jacobian.rules.jet import fold
from fastsfvae.ops.convolution import Geometry, convolve, convolve_backward
from fastsfvae.ops.dispatch import layer_key
from fastsfvae.ops.tangent_activation import stack_activation, stack_activation_backward
from fastsfvae.ops.tangent_layer import Layer, stack_layer, stack_layer_backward

OPERATION = "tangent_conv_transpose relu"
# With the activation's kernel in front, where there is an activation.
LIBRARY = "library"
# On 1 x 1, where that is a product of matrices.
CONVOLUTION = "library's convolution"
# By the product of float32 numbers that the kernel forms.
FUSED = {product: f"fused, {product}" for product in ("ieee", "tf32x3", "tf32")}
HALF = "fused"
# bfloat16 first, as it decides most.
DTYPES = ("bfloat16", "tf32", "float32")
# Which gradients a mode asks for: of the stack, the weight and the bias. What decides comes first.
BACKWARDS = {
    "backward": (True, True, True),
    "data gradient": (True, False, False),
    "weight gradient": (False, True, True),
}
MODES = ("forward", *BACKWARDS)
_DOUBLING = Geometry((2, 2), (1, 1), (1, 1), 1, True, (0, 0))
_OF_ONE = Geometry((1, 1), (0, 0), (1, 1), 1, True, (0, 0))


class Size(NamedTuple):
    """A transposed convolution with kernel 4 in a decoder.

    Attributes:
        m: latents.
        batch: samples.
        channels_in: of its input.
        channels_out: of its result.
        height: of its input, and its width: 1 without padding, any other with stride 2.
        front: the activation in front that it, or the layer before, takes in.
        behind: the one behind that it takes in.
    """

    m: int
    batch: int
    channels_in: int
    channels_out: int
    height: int
    front: str = "relu"
    behind: str = "relu"

    @property
    def geometry(self) -> Geometry:
        """Stride, padding and so on."""
        return _OF_ONE if self.height == 1 else _DOUBLING

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """As PyTorch has it."""
        return self.channels_in, self.channels_out, 4, 4

    @property
    def stack_shape(self) -> tuple[int, int, int, int, int]:
        """Of values and tangents that go in."""
        return 1 + self.m, self.batch, self.channels_in, self.height, self.height

    @property
    def result_shape(self) -> tuple[int, int, int, int, int]:
        """Of values and tangents that come out."""
        height = 4 if self.height == 1 else 2 * self.height
        return 1 + self.m, self.batch, self.channels_out, height, height

    @property
    def flops(self) -> int:
        """Of one product, what the padding crops included."""
        positions = (1 + self.m) * self.batch * self.height**2
        return 2 * positions * self.channels_in * self.channels_out * 16

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Elements of the stack, the result and the weight."""
        x, y = (torch.Size(shape).numel() for shape in (self.stack_shape, self.result_shape))
        return x, y, 16 * self.channels_in * self.channels_out

    def traffic(self, mode: str, itemsize: int) -> int:
        """Least bytes through device memory in a mode; gradients of the weight are float32."""
        x, y, w = self.numbers
        # Of a piecewise linear activation in front the values tell the slope.
        slope = x // (1 + self.m) if self.front != "none" else 0
        numbers = {
            "forward": x + w + y,
            "data gradient": y + w + slope + x,
            "weight gradient": x + y,
            "backward": x + y + w + x,
        }[mode]
        return itemsize * numbers + (4 * w if mode in ("weight gradient", "backward") else 0)

    def layer(self, dtype: str, product: str) -> Layer:
        """As a decoder's plan has it whose layers are all fused."""
        tf32 = dtype == "tf32"
        return Layer(
            *(self.geometry, self.front, (), product, self.front != "none", self.behind, ()),
            rounded=tf32,
            grad_rounded=tf32 and self.behind != "none",
        )

    def key(self, product: str, of_gram: bool = False) -> str:
        """Its name in the table of what was measured, alone or with its Gram."""
        x = self.channels_in, self.height, self.height
        return layer_key("conv_transpose2d", x, self.weight_shape, product, of_gram)


# In the order of what they weigh in a step, but for the last one: a step takes it with its Gram
# (`bench.cases_last_layer`), and alone only where the Jacobian is asked for.
LAYERS = {
    "deconv4": Size(16, 64, 32, 32, 16),
    "deconv3": Size(16, 64, 64, 32, 8),
    "deconv2": Size(16, 64, 64, 64, 4),
    "deconv1": Size(16, 64, 256, 64, 1, front="none"),
    "deconv5": Size(16, 64, 32, 3, 32, behind="none"),
}
# Tests the benchmark, measures nothing.
TINY = {"tiny": Size(2, 2, 4, 3, 3), "tiny first": Size(2, 2, 5, 3, 1, front="none")}


class Inputs(NamedTuple):
    """What a layer reads, channels-last.

    Attributes:
        front: the stack in front of the activation; the library's forward overwrites it.
        stack: the stack behind it.
        weight: of the layer.
        bias: float32 ``[C_out]``.
        grad: of the result, in front of the activation behind the layer.
    """

    front: Tensor
    stack: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor


class Exact(NamedTuple):
    """Results in float64, of the layer without bias; gradients in front of the activation."""

    result: Tensor
    stack: Tensor
    weight: Tensor
    bias: Tensor


def size_of(name: str) -> Size:
    """A layer of either table."""
    return (LAYERS | TINY)[name]


def implementations(name: str, dtype: str) -> dict[str, str | None]:
    """Who computes a layer in one of `DTYPES`: a fused kernel, by its product, or the library."""
    of_dtype = {"tf32": ("tf32",), "float32": ("ieee", "tf32x3")}.get(dtype, ())
    fused: dict[str, str | None] = {FUSED[product]: product for product in of_dtype}
    others = [LIBRARY, *[CONVOLUTION] * (size_of(name).height == 1)]
    return (fused or {HALF: "ieee"}) | dict.fromkeys(others)


def label(name: str) -> str:
    """A layer as a row's shape names it."""
    size = size_of(name)
    C_in, C_out, height = size.channels_in, size.channels_out, size.height
    return f"{name} m={size.m} B={size.batch} {C_in}x{height}x{height} to {C_out}"


def layers(
    device: str, names: Sequence[str] = tuple(LAYERS), dtypes: Sequence[str] = DTYPES
) -> Iterator[Case]:
    """Every mode of each layer by each implementation; nearly all of them use Triton."""
    for dtype in dtypes:
        for name in names:
            for implementation, product in implementations(name, dtype).items():
                for mode in MODES:
                    yield _case(device, name, dtype, implementation, product, mode)


def draw(size: Size, dtype: str, device: str, seed: int) -> Inputs:
    """Random inputs, the same for each implementation and mode.

    With TF32 they are rounded already, as a step's fused layers round what they make.
    """
    g = torch.Generator(device).manual_seed(seed)

    def make(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=g, device=device).to(type_of(dtype)).flatten(0, -4)
        t = t.contiguous(memory_format=torch.channels_last)
        return (rounded(t) if dtype == "tf32" else t).unflatten(0, shape[:-3])

    front, weight = make(*size.stack_shape), make(*size.weight_shape) / 8
    stack = front.clone()
    if size.front != "none":
        stack[1:] *= front[:1] > 0
        stack[0].relu_()
    bias = torch.randn(size.channels_out, generator=g, device=device)
    return Inputs(front, stack, weight, bias, make(*size.result_shape))


def type_of(dtype: str) -> torch.dtype:
    """What numbers of one of `DTYPES` are kept in."""
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


@contextlib.contextmanager
def natively() -> Iterator[None]:
    """Convolutions by PyTorch's own code, an image at a time: none of those that are measured."""
    before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def convolution(x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """The library's transposed convolution, whatever other form there is."""
    options = g.stride, g.padding, g.output_padding, g.groups, g.dilation
    return F.conv_transpose2d(x, weight, None, *options)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, g: Geometry, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Its gradients, as `convolve_backward` has them."""
    options = g.stride, g.padding, g.dilation, True, g.output_padding, g.groups
    given = grad, x, weight, None, *options, [*needs, False]
    return torch.ops.aten.convolution_backward(*given)[:2]


# A layer has as many cases as share this.
@functools.lru_cache(maxsize=1)
def exact(name: str, dtype: str, device: str) -> Exact:
    """The results for the first inputs, by float64 on the device: all samples and slots."""
    size = size_of(name)
    inputs = draw(size, dtype, device, 0)
    x, weight = (t.double().requires_grad_() for t in (inputs.stack, inputs.weight))
    grad = inputs.grad.double()
    with natively():
        result = convolution(fold(x), weight, size.geometry).unflatten(0, x.shape[:2])
        of_stack, of_weight = torch.autograd.grad(result, (x, weight), grad)
    if size.front != "none":
        of_stack *= x.detach()[:1] > 0
    return Exact(result.detach(), of_stack, of_weight, grad[0].sum((0, 2, 3)))


def error_of(
    name: str, dtype: str, device: str, mode: str, fused: bool, outputs: Sequence[Tensor]
) -> float:
    """How far a case's outputs are from `exact`, relative to each one's norm."""
    found = exact(name, dtype, device)
    if mode in BACKWARDS:
        needs = BACKWARDS[mode]
        return relative_error(outputs, [t for t, n in zip(found[1:], needs, strict=True) if n])
    want = found.result
    if fused:
        # The library adds a bias, and applies what follows, in the next layer's pass.
        bias = draw(size_of(name), dtype, device, 0).bias.double()
        want = torch.cat([want[:1] + bias.view(-1, 1, 1), want[1:]])
        if size_of(name).behind != "none":
            want = torch.cat([want[:1].relu(), want[1:] * (want[:1] > 0)])
    return relative_error(outputs, [want])


def _fused(layer: Layer, mode: str, inputs: Inputs) -> tuple[Tensor, ...]:
    _, stack, weight, bias, grad = inputs
    if mode == "forward":
        return (stack_layer(layer, stack, weight, bias),)
    grads = stack_layer_backward(layer, grad, stack, weight, BACKWARDS[mode])
    return tuple(t for t in grads if t is not None)


def _library(size: Size, direct: bool, mode: str, inputs: Inputs) -> tuple[Tensor, ...]:
    front, stack, weight, _, grad = inputs
    g, kind, lead = size.geometry, size.front, stack.shape[:2]
    ways: tuple[Callable[..., Tensor], Callable[..., tuple[Tensor | None, Tensor | None]]]
    ways = (convolution, convolution_backward) if direct else (convolve, convolve_backward)
    if mode == "forward":
        if kind != "none":
            # Of what it leaves there, a ReLU makes the same again.
            stack_activation(front[0], front[1:], kind, (), out=front)
        return (ways[0](fold(front), weight, g).unflatten(0, lead),)
    *of_product, of_bias = BACKWARDS[mode]
    pulled, grad_w = ways[1](fold(grad), fold(stack), weight, g, tuple(of_product))
    if pulled is not None:
        pulled = pulled.unflatten(0, lead)
        if kind != "none":
            given = stack[0], None, pulled[0], pulled[1:], kind, ()
            pulled = stack_activation_backward(*given, out=pulled)
    grad_b = grad[0].sum((0, 2, 3), dtype=torch.float32) if of_bias else None
    return tuple(t for t in (pulled, grad_w, grad_b) if t is not None)


def _case(
    device: str, name: str, dtype: str, implementation: str, product: str | None, mode: str
) -> Case:
    size = size_of(name)
    traffic = size.traffic(mode, type_of(dtype).itemsize)

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        with products(dtype):
            if product is not None:
                return _fused(size.layer(dtype, product), mode, inputs)
            return _library(size, implementation == CONVOLUTION, mode, inputs)

    def prepare() -> Prepared:
        sets = [draw(size, dtype, device, seed) for seed in range(rotations(traffic, device))]
        measure = functools.partial(error_of, name, dtype, device, mode, product is not None)
        return Prepared([lambda s=s: run(s) for s in sets], measure)

    return Case(
        *(OPERATION, implementation, mode, label(name), dtype),
        prepare,
        bytes=traffic,
        flops=size.flops * (2 if mode == "backward" else 1),
        launches=("graph",),
    )
