"""How many kernels a step of decoder and loss launches, forward and backward, every layer fused."""

import pytest

from bench.launches import step
from fastsfvae.kernels._launch import DeviceLimits
from tests._triton import INTERPRETER

H100, RTX_4090 = DeviceLimits(132, 90), DeviceLimits(128, 89)

pytestmark = pytest.mark.skipif(INTERPRETER, reason="launches are recorded, not interpreted")


# What was counted: this library's kernels, and PyTorch's, of which one casts or copies the weights.
# float32 has two launches of a rescue more, TF32 one that rounds the weights; on sm_89 one kernel
# takes both gradients of a layer.
@pytest.mark.parametrize(
    "dtype, limits, kernels, others",
    [
        ("bfloat16", H100, 26, 6),
        ("bfloat16", RTX_4090, 25, 6),
        ("tf32", H100, 29, 6),
        ("float32", H100, 28, 5),
    ],
)
def test_a_step_of_celeba16(dtype, limits, kernels, others):
    found = step("celeba16", dtype, limits, others=True)
    assert 0 < len(found.kernels) <= kernels, [launch.kernel for launch in found.kernels]
    assert 0 < sum(found.others.values()) <= others, found.others
