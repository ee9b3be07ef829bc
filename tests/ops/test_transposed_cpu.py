"""The CPU's forms of transposed convolutions against the library's, in float64."""

import pytest
import torch
import torch.nn.functional as F

from fastsfvae.ops import transposed_cpu
from fastsfvae.ops.convolution import Geometry, convolve, convolve_backward

# kernel, stride, padding, output_padding, input extent, channels in and out.
PHASES = [
    ((4, 4), (2, 2), (1, 1), (0, 0), (5, 7), 6, 3),
    ((2, 2), (2, 2), (0, 0), (0, 0), (3, 4), 5, 1),
    ((6, 4), (3, 2), (2, 1), (1, 1), (4, 3), 2, 4),
    ((4, 6), (4, 2), (3, 5), (2, 0), (3, 6), 3, 2),
    ((8, 3), (2, 3), (0, 1), (0, 1), (1, 2), 4, 2),
]


def _problem(kernel, stride, padding, more, extent, inputs, outputs):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, inputs, *extent, dtype=torch.float64, generator=generator)
    weight = torch.randn(inputs, outputs, *kernel, dtype=torch.float64, generator=generator)
    geometry = Geometry(stride, padding, (1, 1), 1, True, more)
    return x, weight, geometry, F.conv_transpose2d(x, weight, None, stride, padding, more)


@pytest.mark.parametrize("case", PHASES)
def test_phases_are_the_transposed_convolution(case):
    x, weight, geometry, expected = _problem(*case)
    assert transposed_cpu.has_phases(x, weight, geometry)
    got = convolve(x, weight, geometry)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "case",
    [
        # The stride does not divide the kernel; output beyond the full layer; too many channels.
        ((3, 4), (2, 2), (1, 1), (0, 0), (4, 4), 3, 3),
        ((4, 4), (2, 2), (0, 0), (1, 1), (4, 4), 3, 3),
        ((4, 4), (2, 2), (1, 1), (0, 0), (4, 4), 3, 5),
    ],
)
def test_other_geometries_stay_with_the_library(case):
    x, weight, geometry, expected = _problem(*case)
    assert not transposed_cpu.has_phases(x, weight, geometry)
    torch.testing.assert_close(convolve(x, weight, geometry), expected)


def test_one_pixel_is_a_matrix_product():
    x, weight, geometry, expected = _problem((4, 3), (1, 1), (0, 0), (0, 0), (1, 1), 7, 5)
    assert transposed_cpu.is_product(x, weight, geometry)
    atol = 1e-13 * float(expected.abs().max())
    torch.testing.assert_close(convolve(x, weight, geometry), expected, rtol=0, atol=atol)
    grad = torch.randn_like(expected)
    x.requires_grad_(), weight.requires_grad_()
    exact = torch.autograd.grad(F.conv_transpose2d(x, weight), [x, weight], grad)
    for got, want in zip(
        convolve_backward(grad, x.detach(), weight.detach(), geometry, (True, True)),
        exact,
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13 * float(want.abs().max()))
