"""Emulated TF32: what becomes of a number, and of which products' operands."""

import math

import pytest
import torch

import fastsfvae as sf
from bench import tf32


def test_cuts_are_those_of_eleven_bits():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).exp() * 3
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, 1.0, 2.0**-126, 1 + 2**-11, -1 - 2**-11])])
    # Eleven significant bits: multiples of this.
    unit = torch.exp2(torch.frexp(x.double())[1] - 11.0)
    towards_zero = (x.double() / unit).trunc() * unit
    nearest = x.double().sign() * (x.double().abs() / unit + 0.5).floor() * unit
    assert torch.equal(tf32.truncated(x).double(), towards_zero)
    assert torch.equal(tf32.rounded(x).double(), nearest)
    # Its operands are exact in both, and cut again they stay.
    assert torch.equal(tf32.rounded(tf32.truncated(x)), tf32.truncated(x))


def test_what_is_not_finite_stays():
    for value in (math.inf, -math.inf, math.nan):
        got = tf32.rounded(torch.tensor([value]))
        assert torch.equal(got.isnan(), torch.tensor([math.isnan(value)]))
        assert math.isnan(value) or got == value


def _layer(x, weight):
    return torch.nn.functional.linear(x, weight)


def test_operands_of_layers_are_cut_and_the_grams_are_not():
    x, w = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    with tf32.Emulated(tf32.truncated):
        got, gram = _layer(x, w), x[None] @ x.mT[None]
        doubled = _layer(x.double(), w.double())
    assert torch.equal(got, _layer(tf32.truncated(x), tf32.truncated(w)))
    assert not torch.equal(got, _layer(x, w))
    assert torch.equal(gram, x[None] @ x.mT[None])
    assert torch.equal(doubled, _layer(x.double(), w.double()))


@pytest.mark.parametrize("cut, least, most", [("truncated", 1e-4, 2e-3), ("rounded", 1e-7, 1e-4)])
def test_a_sweep_is_reached(cut, least, most):
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(
        torch.nn.Linear(4, 256),
        torch.nn.Unflatten(1, (16, 4, 4)),
        torch.nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1),
    )
    z, x = torch.randn(3, 4), torch.rand(3, 8, 8, 8)
    loss_of = sf.SamplingFreeLoss(decoder, noise_var=0.5, reduction="none")

    def squared_size():
        """Of J: the trace of its Gram."""
        return sf.pullback(decoder, z).gram.diagonal(dim1=1, dim2=2).sum()

    want, loss = squared_size(), loss_of(x, z, torch.zeros(3, 4))
    with tf32.Emulated(getattr(tf32, cut)):
        got, cut_loss = squared_size(), loss_of(x, z, torch.zeros(3, 4))
    assert least < (1 - got / want).abs() < most
    assert not torch.equal(loss, cut_loss)
