"""Decoders on the activations' kernel against float64, next to the torch backend."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastsfvae.gram.pullback import pullback
from fastsfvae.jacobian.api import decode_with_jacobian
from tests._triton import DEVICE, requires_triton

pytestmark = requires_triton
M = 3
ACTIVATIONS = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "elu": nn.ELU(1.3),
    "selu": nn.SELU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "softplus": nn.Softplus(2.0),
    "hardtanh": nn.Hardtanh(-0.5, 0.7),
}


class Transposed(nn.Module):
    """An activation on values that are not dense in their own order."""

    def __init__(self, activation):
        super().__init__()
        self.activation = activation

    def forward(self, h):
        return self.activation(h.transpose(1, 2)[:, ::2])


def build(activation):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(M, 24),
        activation,
        nn.Unflatten(1, (6, 2, 2)),
        nn.ConvTranspose2d(6, 4, 4, 2, 1),
        activation,
        nn.Flatten(2),
        Transposed(activation),
    )


def evaluate(module, z, backend):
    output, jacobian = decode_with_jacobian(module, z, backend=backend)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (torch.randn(t.shape, generator=generator).to(t) * (t + t.square())).sum()
        for t in (output, jacobian)
    )
    return output, jacobian, *torch.autograd.grad(loss, [z, *module.parameters()])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name, channels_last):
    module = build(copy.deepcopy(ACTIVATIONS[name])).to(DEVICE)
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
    z = torch.randn(4, M, device=DEVICE, requires_grad=True)
    exact = evaluate(
        copy.deepcopy(module).double(), z.detach().double().requires_grad_(), "reference"
    )
    ours, plain = evaluate(module, z, "triton"), evaluate(module, z, "torch")
    for a, b, truth in zip(ours, plain, exact, strict=True):
        allowed = 2 * (b - truth).abs().max() + 8 * torch.finfo(a.dtype).eps * truth.abs().max()
        assert (a - truth).abs().max() <= allowed


def test_pullback():
    module = build(nn.SiLU()).to(DEVICE)
    z, x = torch.randn(4, M, device=DEVICE), torch.rand(4, 8, 4, device=DEVICE)
    exact = pullback(copy.deepcopy(module).double(), z.double(), x.double(), backend="reference")
    ours = pullback(module, z, x, backend="triton", chunk_size=2)
    plain = pullback(module, z, x, backend="torch")
    for a, b, truth in zip(ours, plain, exact, strict=True):
        allowed = 2 * (b - truth).abs().max() + 8 * torch.finfo(a.dtype).eps * truth.abs().max()
        assert (a - truth).abs().max() <= allowed


def test_second_order_names_the_way_out():
    module, z = build(nn.Tanh()).to(DEVICE), torch.randn(2, M, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match='backend="torch"'):
        jacobian = decode_with_jacobian(module, z, backend="triton")[1]
        (grad,) = torch.autograd.grad(jacobian.square().sum(), z, create_graph=True)
        grad.sum().backward()
