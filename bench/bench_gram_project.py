"""J, r -> G, p, rr and its adjoint: `pytest bench/bench_gram_project.py`."""

import torch

from bench.cases_kernels import gram_project
from bench.suite import DEVICE, given


@given(
    gram_project(DEVICE, ["m16"], [torch.float32]),
    full=gram_project(DEVICE, ["m16", "m64", "m200"]),
)
def test_gram_project(timed, case):
    timed(case)
