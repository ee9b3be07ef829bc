"""How pytest-benchmark runs a `Case`: checked, timed in turn with its baseline, recorded.

On a CPU every round runs the baseline once before it, outside the clock, so that a row's ratio is a
median of paired ratios; on CUDA pytest-benchmark's own clock includes a synchronisation, and the
recorded row has the times of events and graphs.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch

from bench import memory
from bench.measure import Case, Context, Run, check, why
from bench.peers import OURS, SAMPLING, TRITON
from bench.timing import Timing, quantiles, wall_ms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of one case's rounds, the baseline's included.
SECONDS = 3.0

_cases: dict[str, Case] = {}


def name_of(case: Case) -> str:
    """What tells a case from all others."""
    return " ".join(case.labels.values())


def given(cases: Iterable[Case], full: Iterable[Case]) -> pytest.MarkDecorator:
    """Parametrise a suite by its default cases and, marked `full`, the others."""
    default = {name_of(case): case for case in cases if _runs_here(case)}
    others = {name_of(case): case for case in full if _runs_here(case)}
    every = others | default
    _cases.update(every)
    parameters = [
        pytest.param(case, id=name, marks=[] if name in default else [pytest.mark.full])
        for name, case in every.items()
    ]
    return pytest.mark.parametrize("case", parameters)


def _runs_here(case: Case) -> bool:
    return DEVICE == "cuda" or not case.implementation.startswith(TRITON.rstrip("]"))


def run_case(benchmark, context: Context, case: Case, measure_memory: bool) -> None:
    """Time a case; what is missing, fails or is wrong becomes a row and a skip that say why."""
    try:
        runs, columns = check(case, DEVICE)
    except Exception as reason:
        context.fail(case.labels, reason)
        if case.implementation == OURS:
            raise
        pytest.skip(why(reason))
    rounds = 2 if context.quick else max(5, min(int(SECONDS * 500 / wall_ms(runs[0])), 100))
    if DEVICE == "cuda":
        benchmark.pedantic(_synchronised(runs), rounds=rounds, warmup_rounds=1)
        context.run(case)
    else:
        timing, compared = _in_turn(benchmark, case, runs[0], rounds)
        if measure_memory and case.child:
            columns["peak_mib"] = f"{memory.peak_extra(*case.child) / 2**20:.1f}"
        columns |= context.columns(case, timing) | compared
        context.recorder.write(**case.labels | columns)
    benchmark.extra_info.update(
        **case.labels,
        **{name: value for name, value in columns.items() if value},
        **context.recorder.provenance,
        bytes=case.bytes,
        flops=case.flops,
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        ceilings=dict(context.limit),
    )


def _in_turn(benchmark, case: Case, run: Run, rounds: int) -> tuple[Timing, dict[str, str]]:
    """Times of a CPU case, and their median ratio to the baseline's in the same rounds."""
    name = SAMPLING if case.mode == "step" else OURS
    baseline = _cases.get(name_of(dataclasses.replace(case, implementation=name)))
    if baseline is None or baseline == case:
        benchmark.pedantic(run, rounds=rounds)
        return quantiles([1e3 * s for s in benchmark.stats.stats.data]), {}
    other, before = _prepared(baseline), []
    benchmark.pedantic(run, setup=lambda: before.append(wall_ms(other)), rounds=rounds)
    times = [1e3 * s for s in benchmark.stats.stats.data]
    ratio = statistics.median(t / b for t, b in zip(times, before, strict=True))
    return quantiles(times), {"ratio": f"{ratio:.3f}", "ratio_to": name}


# One only: the inputs of a large workload are not kept for long.
@functools.lru_cache(maxsize=1)
def _prepared(case: Case) -> Run:
    runs, _ = check(case, DEVICE)
    return runs[0]


def _synchronised(runs: Sequence[Run]) -> Callable[[], None]:
    def run() -> None:
        for each in runs:
            each()
        torch.cuda.synchronize()

    return run
