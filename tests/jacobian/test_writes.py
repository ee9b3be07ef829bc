"""In-place writes where one side's tangents are every sample's own and the other's are shared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastsfvae.jacobian.api import decode_with_jacobian
from tests.jacobian.exactness import assert_right

B, M = 4, 3


class Decoder(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.lift, self.function = nn.Linear(M, 4), function
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, z):
        # Behind a linear layer all samples share their tangents, behind a sine none do.
        h = self.lift(z)
        return self.function(self, h, torch.sin(h))


def columns(own, shared, full):
    y = torch.empty_like(shared)
    for i in range(4):
        y[:, i] = shared[:, i] * own.weight[i]
    return y


def columns_by_turns(own, shared, full):
    y = torch.zeros_like(shared)
    for i in range(4):
        y[:, i] = (shared if i % 2 else full)[:, i] * own.weight[i]
    return y * y


def shared_over_full(own, shared, full):
    full = full * own.weight
    first = 2 * full
    full.copy_(shared)
    return full + first


def full_over_shared(own, shared, full):
    first = shared * own.weight
    first.copy_(full)
    return first * shared


def numbers_over_both(own, shared, full):
    a, b = shared * own.weight, full * own.weight
    a[:, 1:].fill_(0.5)
    b[:, :2].zero_()
    b[:, 2] = own.weight[0]
    return a * shared + b * full


def ranges(own, shared, full):
    y = full.clone()
    y[:, :2] = shared[:, 2:]
    y[:, 1:3] += shared[:, :2] * own.weight[:2]
    return y


def overwritten_twice(own, shared, full):
    y = full * own.weight
    y[:, :1] = shared[:, :1]
    y[:, 0] = y[:, 1]
    return y


def complex_branch(own, shared, full):
    """Written without z, but with gradients: PyTorch's own scatters have no complex derivative."""
    weight = torch.complex(own.weight, own.weight.sin())
    y = torch.zeros(full.shape[0], 5, dtype=weight.dtype)
    y[:, 2:] = weight[:3].expand(full.shape[0], 3)
    y[:, 1] = weight[3]
    y[:, 0] = y[:, 2].conj()
    return full * torch.fft.irfft(y, 8)[:, :4]


def complex_values(own, shared, full):
    y = torch.complex(shared, full * own.weight)
    y[:, 1:] = y[:, :3].clone() * torch.complex(full, shared)[:, 1:]
    y[:, 0] = shared[:, 1]
    return torch.view_as_real(y)


@pytest.mark.parametrize(
    "function",
    [
        columns,
        columns_by_turns,
        shared_over_full,
        full_over_shared,
        numbers_over_both,
        ranges,
        overwritten_twice,
        complex_branch,
        complex_values,
    ],
)
def test_right(function):
    torch.manual_seed(0)
    decoder = Decoder(function).double()
    assert_right(decoder, torch.randn(B, M, dtype=torch.float64))


class Masked(nn.Module):
    """Asks for a buffer's value, and writes into zeros of a size that is known for one sample."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(M, 4)
        self.register_buffer("mask", torch.tensor([True, False, True, True]))

    def forward(self, z):
        h = self.lift(z)
        y = torch.zeros(z.shape[0], 4, dtype=z.dtype)
        y[:, :3] = torch.sin(h)[:, :3]
        y[:, 1:].add_(h[:, 1:])
        return (y * h)[:, self.mask]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_zeros_written_beside_a_value_that_is_asked_for(batch):
    torch.manual_seed(0)
    assert_right(Masked().double(), torch.randn(batch, M, dtype=torch.float64))


def test_constant_written_beside_a_value_that_is_asked_for():
    class Constant(Masked):
        def forward(self, z):
            y = (2 * self.mask).to(z.dtype)[None]
            y[:, :2] = self.lift(z)[:1, :2]
            return y.expand(z.shape[0], 4)[:, self.mask]

    with pytest.raises(RuntimeError, match="into a constant .* torch.zeros_like"):
        decode_with_jacobian(Constant(), torch.randn(1, M))
