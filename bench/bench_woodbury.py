"""The m x m factorisation and solve: `pytest bench/bench_woodbury.py`."""

from bench.cases_kernels import woodbury
from bench.suite import DEVICE, given


@given(woodbury(DEVICE, ["m16", "m64"]), full=woodbury(DEVICE, ["m16", "m64", "m200"]))
def test_woodbury(timed, case):
    timed(case)
