"""The sums of a weight's parts and a bias's: few parts and many, in either order, in one launch."""

import pytest
import torch

from fastsfvae.kernels._stack_sums import sum_parts
from tests._triton import assert_as_good, requires_triton
from tests.kernels.stack_layers import draw

pytestmark = requires_triton


# The last two go by another tile; neither they nor the sizes fill a whole number of blocks.
@pytest.mark.parametrize("count", [1, 17, 129, 600])
@pytest.mark.parametrize("shape", [(5, 16, 3), (2, 1, 70)])
def test_against_float64(count, shape, poisoned_empty):
    parts, bias_parts = draw(0, torch.float32, (count, *shape), (count + 3, 5))
    weight, bias = sum_parts(parts, bias_parts)
    for got, of in ((weight, parts), (bias, bias_parts)):
        scale = of.double().abs().sum(0).max()
        assert_as_good(got, of.double().sum(0), of.sum(0), scale)
    alone, nothing = sum_parts(parts, None)
    assert nothing is None and torch.equal(alone, weight)
    room = torch.empty(shape[0], shape[2], shape[1], device=parts.device)
    turned, again = sum_parts(parts, bias_parts, room, turned=True)
    assert turned is room and torch.equal(room, weight.mT) and torch.equal(again, bias)
