"""Gradients of a grouped convolution do not depend on the strides of an image of one position."""

from __future__ import annotations

import pytest
import torch

from fastsfvae.ops.convolution import Geometry, convolve_backward


@pytest.mark.parametrize("strides", [(8, 1, 4, 4), (8, 1, 8, 8), (8, 1, 1, 1), (64, 1, 8, 8)])
@pytest.mark.parametrize("batch", [1, 2])
def test_one_position(strides, batch):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    x, grad, weight = drawn(batch, 8, 1, 1), drawn(batch, 2, 1, 1), drawn(2, 4, 3, 3)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 2, False, (0, 0))
    want = convolve_backward(grad, x, weight, geometry, (True, True))
    restrided = torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)
    got = convolve_backward(grad, restrided, weight, geometry, (True, True))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
