"""round_tf32: to the nearest of ten bits behind the point, in the weight's own order."""

import pytest
import torch

from fastsfvae.kernels.round_tf32 import round_tf32
from tests._triton import DEVICE, requires_triton

pytestmark = requires_triton


@pytest.mark.parametrize("shape", [(1,), (5, 3, 4, 4), (64, 33, 3, 3)])
def test_to_nearest_in_any_order(shape, poisoned_empty):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    if weight.ndim == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    got = round_tf32(weight)
    assert got.stride() == weight.stride()
    # Of a number in [1, 2) the last bit is 2^-10.
    mantissa, exponent = weight.double().frexp()
    want = torch.ldexp((mantissa * 2**11).round(), exponent - 11)
    assert torch.equal(got.double(), want)


def test_ties_and_what_is_no_number():
    inf, nan = float("inf"), float("nan")
    given = torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23, 0.0, inf, -inf, nan])
    want = torch.tensor([1 + 2**-10, -1 - 2**-10, 1, 0, inf, -inf, nan])
    got = round_tf32(given.to(DEVICE)).cpu()
    assert torch.equal(got[:-1], want[:-1]) and got[-1].isnan()


def test_refuses_other_dtypes():
    with pytest.raises(TypeError, match="torch.bfloat16: TF32 is rounded from float32"):
        round_tf32(torch.zeros(2, device=DEVICE, dtype=torch.bfloat16))
