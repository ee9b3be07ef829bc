"""What the tests of fused layers share: an oracle by autograd, and the comparison with it."""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.ops.tangent_layer import Layer, largest_batch
from tests._triton import CUDA, DEVICE, assert_as_good

ACTIVATIONS = {
    "none": (lambda x: 1 * x, ()),
    "relu": (F.relu, ()),
    "hardtanh": (lambda x: F.hardtanh(x, -0.75, 1.25), (-0.75, 1.25)),
    "tanh": (torch.tanh, ()),
    # phi(0) is not 0, so whatever lies outside of the input must not be activated.
    "sigmoid": (torch.sigmoid, ()),
    # Its slope vanishes where its curvature does not.
    "silu": (F.silu, ()),
}


# Sums over the batch, which the kernels return in float32.
WHOLE = ("weight", "bias")


class Results(NamedTuple):
    """A layer's stack and the gradients of its inputs."""

    out: Tensor
    stack: Tensor
    weight: Tensor
    bias: Tensor


def supports(geometry, stack, weight):
    """Whether one call takes the stack; of its values nothing is read."""
    x_shape = stack.shape[2:]
    most = largest_batch(Layer(geometry), len(stack), x_shape, weight.shape, stack.dtype)
    return stack.shape[1] <= most


def draw(seed, dtype, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in shapes]


def moved(phi, stack):
    """The activation on a stack: values, and tangents by its slope."""
    slope = torch.autograd.functional.vjp(
        phi, stack[0], torch.ones_like(stack[0]), create_graph=True
    )[1]
    return torch.cat([phi(stack[0])[None], slope * stack[1:]])


def oracle(phi, layer, stack, weight, bias, grad):
    """Results by autograd, in the dtype of the arguments; `layer` is linear, on [N, ...]."""
    leaves = [t.detach().requires_grad_() for t in (stack, weight, bias)]
    out = layer(moved(phi, leaves[0]).flatten(0, 1), leaves[1]).unflatten(0, stack.shape[:2])
    shape = (-1, *[1] * (stack.ndim - 3)) if stack.ndim == 5 else (-1,)
    out = torch.cat([out[:1] + leaves[2].view(shape), out[1:]])
    return Results(out.detach(), *torch.autograd.grad(out, leaves, grad))


@contextlib.contextmanager
def library_products(product):
    """Have the library multiply float32 numbers as `product` does, and give their eps.

    The CPU knows no TF32.
    """
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [s.fp32_precision for s in settings]
    for s in settings:
        s.fp32_precision = "tf32" if product == "tf32" else "ieee"
    try:
        yield 2**-10 if product == "tf32" and CUDA else None
    finally:
        for s, value in zip(settings, before, strict=True):
            s.fp32_precision = value


def assert_layer(got, phi, layer, stack, weight, bias, grad, eps=None):
    """Compare results with float64, and with plain PyTorch in the stack's dtype."""
    inputs = stack, weight, bias, grad
    want = oracle(phi, layer, *(t.double() for t in inputs))
    plain = oracle(phi, layer, *inputs)
    # The largest sum of absolute terms behind an entry: the same products of absolute values.
    h = moved(phi, stack.double().requires_grad_()).detach().abs()
    scales = oracle(lambda x: 1 * x, layer, h, *(t.double().abs() for t in inputs[1:]))
    for name, g, w, p, s in zip(Results._fields, got, want, plain, scales, strict=True):
        assert g.shape == w.shape and g.dtype == (torch.float32 if name in WHOLE else stack.dtype)
        # A curved activation multiplies and sums over the tangents once more.
        more = 1 + stack.double().abs().max() * len(stack) if name == "stack" else 1
        assert_as_good(g, w, p, s.max() * more, eps)
