"""The log-density with J given under pytest-benchmark: `pytest bench/bench_low_rank.py`."""

import pytest

from bench.loss_only import CANDIDATES, SHAPES, inputs, run_both, worst_error


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("shape", ["m16"])
def test_log_prob_forward_and_backward(benchmark, name, shape):
    pytest.importorskip("linear_operator" if name == "linear_operator" else "torch")
    error = worst_error(CANDIDATES[name], SHAPES[shape])
    assert error < 1e-3, f"{name} is wrong by {error:.1e}: not timed"
    tensors = inputs(SHAPES[shape])
    benchmark.extra_info.update(shape=SHAPES[shape], dtype="float32", error=error)
    benchmark.pedantic(run_both, (CANDIDATES[name], tensors), rounds=7, warmup_rounds=1)
