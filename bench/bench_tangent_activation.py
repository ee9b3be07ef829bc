"""An activation with its tangents, and its adjoint: `pytest bench/bench_tangent_activation.py`."""

import torch

from bench.cases_kernels import tangent_activation
from bench.suite import DEVICE, given


@given(
    tangent_activation(DEVICE, ["celeba16"], [torch.float32]),
    full=tangent_activation(DEVICE, ["celeba16"]),
)
def test_tangent_activation(timed, case):
    timed(case)
