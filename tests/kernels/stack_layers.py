"""What the tests of fused layers share: problems, an oracle by autograd, the comparison with it."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problems import products
from fastsfvae.kernels._stack_sums import Partial, totals
from fastsfvae.kernels._stack_weight import weight_parts
from fastsfvae.ops._geometry import Geometry
from fastsfvae.ops.tangent_layer import Layer, largest_batch, stack_layer, stack_layer_backward
from tests._triton import DEVICE, assert_as_good

ACTIVATIONS = {
    "none": (lambda x: 1 * x, ()),
    "relu": (F.relu, ()),
    # Its slope times a number is exact.
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.25), (0.25,)),
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


def square(stride, padding=1, output_padding=0, groups=1, dilation=1, transposed=False):
    """The geometry that is the same along both axes."""
    stride, padding, dilation, more = ((n, n) for n in (stride, padding, dilation, output_padding))
    return Geometry(stride, padding, dilation, groups, transposed, more)


def supports(geometry, shape, weight, dtype=torch.float32):
    """Whether one call takes a stack and a weight of these shapes."""
    slots, batch, *x_shape = shape
    return batch <= largest_batch(Layer(geometry), slots, x_shape, weight, dtype)


def draw(seed, dtype, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in shapes]


def weight_gradient(plain, windowed, gather, front, *, on_window, bias_size=0):
    """What `weight_parts` leaves, added up: the weight's ``[M, taps, C]``, the bias's or None."""
    shape, device = (plain.shape[4], gather.kernel**2, windowed.shape[4]), plain.device
    of_weight, of_bias = Partial(math.prod(shape), device), Partial(bias_size, device)
    weight_parts(
        *(plain, windowed, gather, front),
        on_window=on_window,
        rooms=of_weight,
        bias_size=bias_size,
        bias_rooms=of_bias if bias_size else None,
    )
    return totals(of_weight, of_bias if bias_size else None, shape)


def image_problem(g, m, B, C_in, C_out, H, W, kernel, dtype=torch.float32):
    """A convolution or its transpose, and what it and its gradients are taken at."""

    def layer(x, weight):
        if g.transposed:
            return F.conv_transpose2d(x, weight, None, g.stride, g.padding, g.output_padding)
        return F.conv2d(x, weight, None, g.stride, g.padding)

    channels = (C_in, C_out) if g.transposed else (C_out, C_in)
    stack, weight, bias = draw(
        0, dtype, (1 + m, B, C_in, H, W), (*channels, kernel, kernel), (C_out,)
    )
    (grad,) = draw(1, dtype, (1 + m, B, *layer(stack[0], weight).shape[1:]))
    return layer, (stack, weight, bias, grad)


def run(g, kind, stack, weight, bias, grad, product="ieee", behind=None):
    """The results of the fused layer; with `behind`, of a stack stored behind its activation."""
    layer = Layer(g, kind, ACTIVATIONS[kind][1], product)
    if behind is not None:
        layer = layer._replace(applied=True, behind=behind, behind_params=ACTIVATIONS[behind][1])
        stack = moved(ACTIVATIONS[kind][0], stack)
    out = stack_layer(layer, stack, weight, bias)
    assert g is None or out[0].is_contiguous(memory_format=torch.channels_last)
    return Results(out, *stack_layer_backward(layer, grad, stack, weight))


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


def moved_by(phi, slopes, stack):
    """The activation on a stack, with the slopes that the stack `slopes` tells by its values."""
    tangents = moved(phi, torch.cat([slopes[:1], stack[1:]]))[1:]
    return torch.cat([phi(stack[:1]), tangents])


def assert_layer(g, kind, layer, inputs, product="ieee", behind=None):
    """Compare results with float64, and with plain PyTorch in the stack's dtype.

    Args:
        g: the geometry; None of a linear layer.
        kind: of the activation in front.
        layer: the same without bias and activation, in plain PyTorch.
        inputs: stack, weight, bias, and the gradient of the result.
        product: of float32 numbers; the library multiplies them so too.
        behind: the activation behind which the result is stored, where stacks are stored so: the
            layer is then given `inputs` behind `kind`, and its gradients are in front of both.
    """
    stack, weight, *_ = inputs
    assert supports(g, stack.shape, weight.shape, stack.dtype)
    phi = ACTIVATIONS[kind][0]
    with products(product):
        got = run(g, kind, *inputs, product, behind)
        plain = oracle(phi, layer, *inputs)
    want = oracle(phi, layer, *(t.double() for t in inputs))
    if behind is not None:
        # A value at 0 may round to either side: its tangents follow what was stored.
        psi = ACTIVATIONS[behind][0]
        want = want._replace(out=moved_by(psi, got.out.double(), want.out))
        plain = plain._replace(out=moved_by(psi, got.out, plain.out))
    # The largest sum of absolute terms behind an entry: the same products of absolute values.
    h = moved(phi, stack.double().requires_grad_()).detach().abs()
    scales = oracle(lambda x: 1 * x, layer, h, *(t.double().abs() for t in inputs[1:]))
    # The interpreter truncates operands as tensor cores do; the CPU's library knows no TF32.
    eps = 2**-10 if product == "tf32" else None
    for name, g, w, p, s in zip(Results._fields, got, want, plain, scales, strict=True):
        assert g.shape == w.shape and g.dtype == (torch.float32 if name in WHOLE else stack.dtype)
        # A curved activation multiplies and sums over the tangents once more.
        more = 1 + stack.double().abs().max() * len(stack) if name == "stack" else 1
        assert_as_good(g, w, p, s.max() * more, eps)
