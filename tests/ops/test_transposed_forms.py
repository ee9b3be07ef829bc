"""Other forms of transposed convolutions, against the library's in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsfvae.ops import transposed_forms
from fastsfvae.ops.convolution import Geometry, convolve, convolve_backward
from tests._triton import assert_as_good

# kernel, stride, padding, output_padding, input extent, channels in and out.
PHASES = [
    ((4, 4), (2, 2), (1, 1), (0, 0), (5, 7), 6, 3),
    ((2, 2), (2, 2), (0, 0), (0, 0), (3, 4), 5, 1),
    ((6, 4), (3, 2), (2, 1), (1, 1), (4, 3), 2, 4),
    ((4, 6), (4, 2), (3, 5), (2, 0), (3, 6), 3, 2),
    ((8, 3), (2, 3), (0, 1), (0, 1), (1, 2), 4, 2),
]
ONE_PIXEL = [
    ((4, 4), (1, 1), (0, 0), (0, 0), (1, 1), 32, 8),
    ((4, 3), (2, 1), (0, 0), (0, 0), (1, 1), 7, 5),
    ((1, 1), (1, 1), (0, 0), (0, 0), (1, 1), 3, 1),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _problem(kernel, stride, padding, more, extent, inputs, outputs):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, inputs, *extent, dtype=torch.float64, generator=generator)
    weight = torch.randn(inputs, outputs, *kernel, dtype=torch.float64, generator=generator)
    geometry = Geometry(stride, padding, (1, 1), 1, True, more)
    return x, weight, geometry, F.conv_transpose2d(x, weight, None, stride, padding, more)


def _library(x, weight, g):
    return F.conv_transpose2d(x, weight, None, g.stride, g.padding, g.output_padding)


@pytest.mark.parametrize("case", PHASES)
def test_phases_are_the_transposed_convolution(case):
    x, weight, geometry, expected = _problem(*case)
    got = transposed_forms.by_phases(x, weight, geometry)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*PHASES, *ONE_PIXEL])
def test_values_are_as_good_as_the_library_s(case, dtype):
    x, weight, geometry, _ = _problem(*case)
    x, weight = x.to(dtype), weight.to(dtype)
    form = transposed_forms.is_product if case in ONE_PIXEL else transposed_forms.has_phases
    assert form(x, weight, geometry)
    want = _library(x.double(), weight.double(), geometry)
    scale = _library(x.double().abs(), weight.double().abs(), geometry).max()
    got, plain = convolve(x, weight, geometry), _library(x, weight, geometry)
    assert got.dtype == dtype
    assert_as_good(got, want, plain, scale)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", [PHASES[0], ONE_PIXEL[0]])
def test_autocast_gives_what_casts_give(case, dtype):
    x, weight, geometry, _ = _problem(*case)
    want = convolve(x.to(dtype), weight.to(dtype), geometry)
    with torch.autocast("cpu", dtype):
        # What the layer in front gives is cast already, and so may the weight be.
        for given in ((x.float(), weight.float()), (x.to(dtype), weight.float())):
            torch.testing.assert_close(convolve(*given, geometry), want, rtol=0, atol=0)
        exact = convolve(x, weight, geometry)
    assert exact.dtype == torch.float64


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
    x, weight = x.float(), weight.float()
    assert not transposed_forms.has_phases(x, weight, geometry)
    torch.testing.assert_close(convolve(x, weight, geometry), expected.float())


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("case", ONE_PIXEL)
def test_gradients_of_one_pixel_are_as_good_as_the_library_s(case, dtype):
    x, weight, geometry, expected = _problem(*case)
    x, weight, grad = x.to(dtype), weight.to(dtype), torch.randn_like(expected).to(dtype)
    assert transposed_forms.is_product(x, weight, geometry)

    def library(*tensors):
        grad, *leaves = (t.detach().clone() for t in tensors)
        out = _library(*(t.requires_grad_() for t in leaves), geometry)
        return torch.autograd.grad(out, leaves, grad)

    wide = [t.double() for t in (grad, x, weight)]
    for parts in zip(
        convolve_backward(grad, x, weight, geometry, (True, True)),
        *(library(*wide), library(grad, x, weight), library(*(t.abs() for t in wide))),
        strict=True,
    ):
        *compared, scale = parts
        assert_as_good(*compared, scale.max())


def test_only_wanted_gradients_are_computed():
    x, weight, geometry, expected = _problem(*ONE_PIXEL[0])
    both = convolve_backward(expected, x, weight, geometry, (True, True))
    of_x, none = convolve_backward(expected, x, weight, geometry, (True, False))
    assert none is None
    none, of_weight = convolve_backward(expected, x, weight, geometry, (False, True))
    assert none is None
    torch.testing.assert_close((of_x, of_weight), both, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("tf32_matrices", [False, True])
@pytest.mark.parametrize("tf32_convolutions", [False, True])
def test_a_product_is_no_coarser_than_the_convolution(
    device, dtype, tf32_matrices, tf32_convolutions, monkeypatch
):
    allowed = {"linear": tf32_matrices, "conv_transpose2d": tf32_convolutions}
    monkeypatch.setattr(transposed_forms, "allows_tf32", allowed.__getitem__)
    geometry = Geometry((1, 1), (0, 0), (1, 1), 1, True, (0, 0))
    with FakeTensorMode():
        x = torch.empty(2, 3, 1, 1, dtype=dtype, device=device)
        weight = torch.empty(3, 5, 4, 4, dtype=dtype, device=device)
        coarser = tf32_matrices and not tf32_convolutions
        expected = not (device == "cuda" and dtype == torch.float32 and coarser)
        assert transposed_forms.is_product(x, weight, geometry) == expected
        assert not transposed_forms.is_product(x.expand(2, 3, 1, 2), weight, geometry)
        assert not transposed_forms.is_product(x, weight, geometry._replace(padding=(1, 1)))
        assert not transposed_forms.is_product(x, weight, geometry._replace(dilation=(2, 1)))
