"""Decoder and loss under pytest-benchmark: `pytest bench/bench_step.py`."""

import pytest

from bench.decoder_loss import CANDIDATES, disagreement, problem, run


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize(("workload", "batch"), [("celeba16", 16), ("mnist2", 64), ("tanh", 20)])
def test_step(benchmark, name, workload, batch):
    tensors = problem(workload, batch)
    error = disagreement(CANDIDATES[name], tensors)
    assert error < 1e-3, f"{name} is wrong by {error:.1e}: not timed"
    benchmark.extra_info.update(workload=workload, batch=batch, dtype="float32", error=error)
    benchmark.pedantic(run, (CANDIDATES[name], tensors), rounds=7, warmup_rounds=1)
