"""f(z) and J, against the ways of torch.func: `pytest bench/bench_jacobian.py`."""

from bench.cases_steps import jacobian
from bench.problems import FULL
from bench.suite import DEVICE, given


@given(jacobian(DEVICE, ["celeba16"], 16), full=jacobian(DEVICE, FULL))
def test_jacobian(timed, case):
    timed(case)
