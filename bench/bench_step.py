"""A whole training step, against the sampling VAE's: `pytest bench/bench_step.py`."""

from bench.cases_steps import PRECISIONS, training_step
from bench.problems import FULL
from bench.suite import DEVICE, given


@given(
    [*training_step(DEVICE, ["celeba16"], 16), *training_step(DEVICE, ["mnist2"])],
    full=training_step(DEVICE, FULL, dtypes=PRECISIONS if DEVICE == "cuda" else ["float32"]),
)
def test_step(timed, case):
    timed(case)
