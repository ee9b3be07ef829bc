"""The log-density with J given, against its peers: `pytest bench/bench_low_rank.py`."""

from bench.cases_kernels import low_rank
from bench.suite import DEVICE, given


@given(low_rank(DEVICE, ["m16"]), full=low_rank(DEVICE, ["m16", "m64", "m200"]))
def test_low_rank(timed, case):
    timed(case)
