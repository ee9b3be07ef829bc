"""Operands of TF32 products: what nobody has rounded is rounded on load, and biases no product."""

import pytest
import torch
import torch.nn.functional as F

from fastsfvae.kernels._launch import DeviceLimits, pretend
from fastsfvae.ops._precision import rounded_to_tf32
from fastsfvae.ops.gram_tail import Tail
from fastsfvae.ops.tangent_layer import Layer, stack_layer, stack_layer_backward
from tests._triton import DEVICE, requires_triton
from tests.kernels.stack_layers import oracle, square
from tests.kernels.test_gram_tail import GEOMETRY, NAMES, run
from tests.kernels.test_gram_tail import oracle as tail_oracle
from tests.kernels.test_gram_tail import problem as tail_problem

pytestmark = requires_triton

ACTIVATIONS = {"none": lambda x: 1 * x, "relu": F.relu, "tanh": torch.tanh, "gelu": F.gelu}
# A unit in the last of ten bits is 2^-11 to 2^-10 of a number: truncation takes half of one away on
# average, 3.5e-4 of the number, from each operand. What is left of a mean of roundings to the
# nearest is less than this.
LEFT, CUT = 1e-5, 3e-4


def positive(seed, *shape):
    """Numbers of 24 bits between 1/4 and 1, as many near either."""
    g = torch.Generator().manual_seed(seed)
    return torch.exp2(-2 * torch.rand(shape, generator=g)).to(DEVICE)


def exact(seed, *shape):
    """Positive numbers of three bits."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(1, 8, shape, generator=g) / 8).to(DEVICE)


def image_layer(g):
    if g.transposed:
        return lambda x, w: F.conv_transpose2d(x, w, None, g.stride, g.padding)
    return lambda x, w: F.conv2d(x, w, None, g.stride, g.padding)


# Geometry, weight and one sample of a stack: of every kernel that a product or its gradient takes.
LAYERS = {
    "linear": (None, (24, 32), (32,), 64),
    "conv": (square(1), (8, 16, 3, 3), (16, 6, 6), 3),
    "halving": (square(2), (8, 16, 4, 4), (16, 8, 8), 8),
    "doubling": (square(2, transposed=True), (16, 8, 4, 4), (16, 6, 6), 3),
    "narrow": (square(2, transposed=True), (16, 3, 4, 4), (16, 6, 6), 8),
}


def problem(name):
    g, weight, sample, batch = LAYERS[name]
    layer = F.linear if g is None else image_layer(g)
    stack, weight = positive(0, 2, batch, *sample), exact(1, *weight)
    grad = positive(2, 2, *layer(stack[0], weight).shape)
    return g, layer, (stack, weight, torch.zeros(grad.shape[2], device=DEVICE), grad)


def biases(name, kind, **known):
    """Relative ones of the forward, the tangents' gradient and the weight's, by name."""
    g, layer, inputs = problem(name)
    stack, weight, bias, grad = inputs
    fused = Layer(g, kind, product="tf32", **known)
    got = stack_layer(fused, stack, weight, bias), *stack_layer_backward(fused, grad, stack, weight)
    want = oracle(ACTIVATIONS[kind], layer, *(t.double() for t in inputs))
    # Curvature makes differences of the values' gradient.
    pairs = {
        "forward": (got[0], want.out),
        "data": (got[1][1:], want.stack[1:]),
        "weight": (got[2], want.weight),
    }
    return {of: (a.double() / b - 1).mean().item() for of, (a, b) in pairs.items()}


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_operands_that_nobody_has_rounded(name, kind):
    found = biases(name, kind)
    assert all(abs(bias) < LEFT for bias in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 120])
def test_operands_on_other_cards(capability):
    with pretend(DeviceLimits(4, capability)):
        found = biases("doubling", "tanh")
    assert all(abs(bias) < LEFT for bias in found.values()), found


@pytest.mark.slow
def test_what_is_known_to_be_rounded_is_not_rounded_again():
    # These are not, so it shows.
    found = biases("conv", "none", rounded=True, grad_rounded=True)
    assert found["forward"] < -CUT and found["data"] < -CUT and found["weight"] < -2 * CUT
    # An activation on load leaves no number as it was.
    found = biases("conv", "tanh", rounded=True)
    assert all(abs(bias) < LEFT for bias in found.values()), found


def test_no_number_stays_none():
    g, _, (stack, weight, bias, _) = problem("conv")
    inf, nan = float("inf"), torch.tensor([-1], dtype=torch.int32).view(torch.float32).item()
    stack[0, 0, :, 1, 1], stack[1, 1, :, 2, 2] = inf, nan
    out = stack_layer(Layer(g, product="tf32"), stack, weight, bias)
    assert (out[0, 0, :, :3, :3] == inf).all() and out[1, 1, :, 1:4, 1:4].isnan().all()
    assert out.isfinite().sum() == out.numel() - 2 * 9 * 8


def test_what_a_last_layer_gives_is_rounded_however_it_multiplies():
    # For so many tangents of an odd number of channels there is no room for TF32's backward.
    tail, x, cotangents = tail_problem(1, 33, 3, 3, 3, 5, "silu")
    tail = tail._replace(layer=tail.layer._replace(product="tf32"))
    found = dict(zip(NAMES, run(tail, x, cotangents), strict=True))["stack"]
    assert found.count_nonzero() and torch.equal(found, rounded_to_tf32(found))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "gelu"])
def test_a_last_layer_with_its_gram(kind):
    layer = Layer(GEOMETRY, kind, product="tf32")
    tail = Tail(layer, positive(0, 4, 8, 32, 5, 5), exact(1, 32, 3, 4, 4), exact(2, 3))
    x = 64 + 400 * positive(3, 8, 3, 10, 10)
    cotangents = exact(4, 8, 3, 3), exact(5, 8, 3), exact(6, 8)
    got = dict(zip(NAMES, run(tail, x, cotangents), strict=True))
    want = dict(zip(NAMES, tail_oracle(tail, x, cotangents, torch.float64), strict=True))
    found = {n: (got[n].double() / want[n] - 1).mean().item() for n in ("G", "p", "weight")}
    assert all(abs(bias) < LEFT for bias in found.values()), found
