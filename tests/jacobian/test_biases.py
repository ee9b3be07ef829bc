"""Biases of a linear layer in every shape and order: on the kernels, the same loss and gradients.

A kernel reads one number a channel; what is broadcast otherwise is left to the library.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsfvae as sf
from fastsfvae.jacobian.run.cache import Linearizer
from tests._triton import DEVICE, assert_as_good, requires_triton

pytestmark = requires_triton
B, M = 5, 3


class Biased(nn.Module):
    """A layer of the latents and one between activations, of 8 channels and of 7 on three rows."""

    def __init__(self, shapes, of=lambda bias: bias):
        super().__init__()
        self.lift, self.widen = nn.Linear(M, 24, bias=False), nn.Linear(8, 7, bias=False)
        self.last = nn.Linear(21, 4)
        self.biases = nn.ParameterList(torch.randn(shape) for shape in shapes)
        self.of = of

    def forward(self, z):
        first, second = (self.of(bias) for bias in self.biases)
        h = torch.relu(F.linear(z, self.lift.weight, first)).view(-1, 3, 8)
        return self.last(torch.relu(F.linear(h, self.widen.weight, second)).flatten(1))


CASES = {
    "one number": ([(1,), (1,)],),
    "no axis": ([(), ()],),
    "an axis more": ([(1, 24), (1, 7)],),
    "of rows and channels": ([(24,), (3, 7)],),
    "strided": ([(48,), (14,)], lambda bias: bias[::2]),
    "turned": ([(24,), (7,)], lambda bias: bias.flip(0)),
    "from a matrix": ([(24, 2), (7, 3)], lambda bias: bias[:, 1]),
    "expanded": ([(1,), (7,)], lambda bias: bias.expand(24 if len(bias) == 1 else 7)),
    "none": ([(24,), (7,)], lambda bias: None),
}
FUSED = {
    **dict.fromkeys(("one number", "no axis", "an axis more"), [False, False]),
    "of rows and channels": [True, False],
}


def build(name):
    torch.manual_seed(0)
    return Biased(*CASES[name]).to(DEVICE)


def gradients(module, tensors, backend):
    with sf.fused_layers("always"):
        loss = sf.SamplingFreeLoss(module, noise_var=0.3, gamma=0.6, backend=backend)
        value = loss(*tensors).sum()
    leaves = [*tensors, *module.parameters()]
    return [
        value.detach(),
        *torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True),
    ]


@pytest.mark.parametrize("name", CASES)
def test_the_same_loss_and_gradients(name):
    module = build(name)
    g = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, generator=g).to(DEVICE) for shape in ((B, 4), (B, M), (B, M))]
    single = [t.requires_grad_() for t in drawn]
    double = [t.detach().double().requires_grad_() for t in drawn]
    want = gradients(copy.deepcopy(module).double(), double, "torch")
    scale = max(float(t.abs().max()) for t in want)
    plain, got = (gradients(module, single, backend) for backend in ("torch", "triton"))
    for mine, oracle, other in zip(got, want, plain, strict=True):
        assert_as_good(mine, oracle, other, scale)


@pytest.mark.parametrize("name", CASES)
def test_kernels_take_what_has_one_number_a_channel(name):
    module, z = build(name), torch.zeros(B, M, device=DEVICE)
    with sf.fused_layers("always"):
        steps = Linearizer(module, z, backend="triton").plan(B).steps
    taken = [s.choice.how == "fused" for s in steps if s.op == "linear"][:2]
    assert taken == FUSED.get(name, [True, True])
