"""Which layers of a decoder are told that what they read is rounded to TF32, and whether it is."""

import pytest
import torch
from torch import nn

import fastsfvae as sf
from bench.problems import products
from fastsfvae.jacobian.rules import fused_layer
from fastsfvae.ops import _precision, gram_tail
from tests._triton import requires_triton
from tests.decoders import M
from tests.jacobian.test_fused_layers import build, build_of, gradients, tensors

pytestmark = requires_triton


def curved():
    layers = [nn.Linear(M, 2 * 4), nn.ReLU(), nn.Unflatten(1, (2, 2, 2))]
    layers += [nn.ConvTranspose2d(2, 3, 4, 2, 1), nn.Tanh()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(3, 2, 4, 2, 1), nn.Sigmoid())


def mixed():
    """A linear layer between convolutions."""
    image = nn.Unflatten(1, (2, 3, 3))
    layers = [nn.Linear(M, 2 * 9), nn.ReLU(), image, nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(27, 2 * 9), nn.ReLU(), image]
    return nn.Sequential(*layers, nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1))


class Twice(nn.Module):
    """A layer of the latents, and another one, that two layers read."""

    def __init__(self):
        super().__init__()
        self.lift, self.widen = nn.Linear(M, 5), nn.Linear(5, 6)
        self.first, self.second, self.third = (nn.Linear(n, 6) for n in (5, 6, 6))

    def forward(self, z):
        h = self.lift(z).relu()
        y = self.widen(h).relu()
        return self.first(h) + self.second(y).relu() * self.third(y)


def is_rounded(t):
    return not (t.contiguous().view(torch.int32) & 0x1FFF).any()


@pytest.fixture
def told(monkeypatch):
    """Of each layer's backward: what it is told of the stack and the gradient that it reads."""
    seen = []
    for module in (fused_layer, gram_tail):
        backward = module.stack_layer_backward

        def spy(layer, grad, stack, *args, _backward=backward, **kwargs):
            assert layer.product == "tf32" or not (layer.rounded or layer.grad_rounded)
            assert not layer.rounded or is_rounded(stack)
            assert not layer.grad_rounded or is_rounded(grad)
            seen.append((layer.rounded, layer.grad_rounded))
            return _backward(layer, grad, stack, *args, **kwargs)

        monkeypatch.setattr(module, "stack_layer_backward", spy)
    return seen


@pytest.mark.slow
# From the last layer to the first.
@pytest.mark.parametrize(
    "make, expected",
    [
        # A last layer taken with its Gram gives and takes what is rounded.
        ("paper", [(True, True)] * 3),
        # Tanh is applied on load: the stack in front of it is not rounded.
        (curved, [(False, True), (True, True)]),
        # Nobody has rounded J's gradient, the library's convolution's, or what it makes.
        ("tanh", [(False, False), (True, True)]),
        ("skip", [(False, False), (False, False), (True, False)]),
        # What two layers read neither layer in front has made for one; and gradients are added up.
        (Twice, [(False, False)] * 4),
    ],
)
def test_what_is_said_to_be_rounded_is(make, expected, told):
    module = build(make) if isinstance(make, str) else build_of(make)
    with products("tf32"), sf.fused_layers("always"):
        gradients(module, tensors(module))
    assert told == expected


@pytest.mark.slow
def test_layers_that_multiply_otherwise(told, monkeypatch):
    # As PyTorch's own settings are: convolutions alone in TF32.
    monkeypatch.setattr(_precision, "allows_tf32", lambda operation: operation != "linear")
    module = build_of(mixed)
    with sf.fused_layers("always"):
        gradients(module, tensors(module))
    # What a linear layer makes, forwards and backwards, it does not round.
    assert told == [(True, False), (False, True), (False, False), (True, False)]
