"""Two commits in one run: `python -m bench.compare HEAD~1 HEAD`.

Each commit is checked out into a worktree of its own and timed by a process of its own; the two
take turns, first one and then the other in front. For each problem the median of the paired ratios
is printed with its 95% interval by order statistics, which assumes nothing about the noise. The
exit status is 1 where even the lower end is above 1 + tolerance.

Both are driven by the benchmarks of the present checkout, through the public interface alone.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import bench.checkout
from bench.command import ROOT, make_parser
from bench.timing import wall_ms

PROBLEMS = ("m16", "celeba16:16", "mnist2")
FEWEST_ROUNDS = 6
# In front of a workload: its pullback and not its loss.
PULLBACK = "pullback/"


class Interval(NamedTuple):
    """A median and the ends of its 95% interval."""

    low: float
    median: float
    high: float


def median_interval(values: Sequence[float]) -> Interval:
    """Of at least six values: the k-th smallest and largest, with P(Bin(n, 1/2) < k) <= 2.5%."""
    ordered, n = sorted(values), len(values)
    if n < FEWEST_ROUNDS:
        raise ValueError(f"rounds={n}: give at least {FEWEST_ROUNDS} for a 95% interval")
    below, k = 0.0, 0
    while (below := below + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return Interval(ordered[k - 1], middle, ordered[n - k])


def work(problem: str) -> None:
    """In a commit's own process: one run for each line read, its milliseconds for each written."""
    import torch

    import fastsfvae as sf
    from bench.problems import GAMMA, GIVEN, NOISE_VAR, build_problem, given_jacobian

    if problem in GIVEN:
        leaves = list(given_jacobian(problem))

        def evaluate():
            J, r, h = leaves
            return sf.low_rank_log_prob(r, J, h, noise_var=NOISE_VAR).sum()
    else:
        name, _, batch = problem.removeprefix(PULLBACK).partition(":")
        found = build_problem(name, int(batch) if batch else None)
        loss = sf.SamplingFreeLoss(found.decoder, noise_var=NOISE_VAR, gamma=GAMMA)
        leaves = found.leaves
        if problem.startswith(PULLBACK):
            leaves = [found.mean, *found.decoder.parameters()]

        def evaluate():
            if problem.startswith(PULLBACK):
                return sum(t.sum() for t in sf.pullback(found.decoder, found.mean, found.x))
            return loss(found.x, found.mean, found.log_var)

    def run() -> None:
        torch.autograd.grad(evaluate(), leaves)

    run()
    for _ in sys.stdin:
        print(wall_ms(run), flush=True)


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A checkout of a commit, for as long as the block runs.

    Raises:
        ValueError: for what git cannot check out.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        add = [*git, "add", "--detach", str(path), commit]
        done = subprocess.run(add, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{commit!r} cannot be checked out: {done.stderr.strip()}")
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True, capture_output=True)


@contextlib.contextmanager
def worker(root: Path, problem: str) -> Iterator[subprocess.Popen]:
    """A process that times a checkout's code."""
    command = [sys.executable, "-m", "bench.compare", "--worker", problem]
    environment = {**os.environ, bench.checkout.CHECKOUT: str(root)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()


def time_once(process: subprocess.Popen) -> float:
    """Milliseconds of one run.

    Raises:
        RuntimeError: where the process has died.
    """
    try:
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())
    except (BrokenPipeError, ValueError):
        raise RuntimeError("a commit's process died: its error is above") from None


def ratios(a: Path, b: Path, problem: str, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of checkout `a`, and the paired ratios of `b` to it."""
    with worker(a, problem) as first, worker(b, problem) as second:
        before, found = [], []
        # The first round warms up.
        for number in range(rounds + 1):
            order = (first, second) if number % 2 else (second, first)
            times = {process: time_once(process) for process in order}
            if number:
                before.append(times[first])
                found.append(times[second] / times[first])
    return before, found


def main(arguments: list[str] | None = None) -> int:
    """Compare and print; return 1 for a regression."""
    parser = make_parser("compare", __doc__)
    parser.add_argument("a", nargs="?", default="HEAD~1", help="the commit that is compared with")
    parser.add_argument("b", nargs="?", default="HEAD", help="the commit that may be slower")
    parser.add_argument(
        "--problem", action="append", help=f"m16, m64, m200, or [{PULLBACK}]WORKLOAD[:BATCH]"
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tolerance", type=float, default=0.03)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options.worker)
        return 0
    slower = False
    try:
        with worktree(options.a) as a, worktree(options.b) as b:
            for problem in options.problem or PROBLEMS:
                before, found = ratios(a, b, problem, options.rounds)
                interval = median_interval(found)
                regressed = interval.low > 1 + options.tolerance
                slower |= regressed
                print(
                    f"{problem:14s} {median_interval(before).median:9.2f} ms at {options.a}; "
                    f"{options.b} takes {interval.median:.3f} times that "
                    f"({interval.low:.3f} to {interval.high:.3f})"
                    f"{': REGRESSION' if regressed else ''}"
                )
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
