"""Compiles what the first parts launch, ahead and on every core: a launch finds it on the disk.

The launches are recorded, so that this takes no GPU; what each compiles is what the JIT would: the
kernel and, where Triton builds one for each signature (before 3.8), the C code that launches it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent import futures
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.cases_steps import PRECISIONS
from bench.launches import divides_with, step
from bench.measure import Context, OutOfTime, why
from bench.problems import WORKLOADS
from fastsfvae.kernels._launch import DeviceLimits

# Of the layers of a step; "auto" takes some of either.
SETTINGS = "always", "never"


class Job(NamedTuple):
    """Every so many-th launch of a step.

    Attributes:
        workload: one of `WORKLOADS`.
        dtype: of `PRECISIONS`.
        layers: of `SETTINGS`.
        divides: as in `bench.launches.step`.
        first: of the launches.
        every: which of them.
        limits: of the card.
        launchers: whether to build the C code, which is linked with the driver's library.
    """

    workload: str
    dtype: str
    layers: str
    divides: int
    first: int
    every: int
    limits: DeviceLimits
    launchers: bool


def part(context: Context) -> None:
    """Compile the smoke test's and the profile's kernels."""
    _compile(context, ["tiny"] if context.quick else ["celeba16"])


def larger(context: Context) -> None:
    """Compile what the headlines launch besides."""
    _compile(context, ["tiny"] if context.quick else ["celeba32", "celeba64"])


def _compile(context: Context, names: Sequence[str]) -> None:
    cores = len(os.sched_getaffinity(0))
    limits, l2 = _card(context.device)
    dtypes = ["bfloat16"] if context.quick else PRECISIONS
    labels = {"op": "compile", "shape": " ".join(names), "mode": f"sm_{limits.capability}"}
    # Again in a second call: it may be on another machine, whose disk has none of them.
    divided = {0, l2 if divides_with(l2) else 0}
    steps = [*product(names, dtypes, SETTINGS, divided)]
    every = -(-cores // len(steps))
    on_gpu = context.device == "cuda"
    jobs = [Job(*of, first, every, limits, on_gpu) for of in steps for first in range(every)]
    started, failed = time.monotonic(), []
    count = 0
    with context.running(labels), mock.patch.dict(os.environ):
        # The interpreter compiles nothing.
        os.environ.pop("TRITON_INTERPRET", None)
        spawning = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(cores, mp_context=spawning) as pool:
            running = [pool.submit(compile_job, job) for job in jobs]
            try:
                for done in as_completed(running, max(1.0, context.deadline - time.monotonic())):
                    compiled, reasons = done.result()
                    count += compiled
                    failed += reasons
            except BrokenExecutor as reason:
                # A compiler that aborts takes its process along; a launch will tell which it is.
                failed.append(("", why(reason)))
            except futures.TimeoutError:
                # They would be waited for.
                for worker in multiprocessing.active_children():
                    worker.kill()
                raise OutOfTime from None
    for reason in sorted(set(failed)):
        context.recorder.write(op="compile", implementation=reason[0], note=reason[1])
    note = f"{count} kernels in {time.monotonic() - started:.1f} s on {cores} cores"
    context.recorder.write(**labels, note=f"{note}, {len(set(failed))} failed")


def compile_job(job: Job) -> tuple[int, list[tuple[str, str]]]:
    """Compile a job's kernels: how many, and name and reason of those that did not."""
    # As many as the cores do this at once.
    torch.set_num_threads(1)
    batch = WORKLOADS[job.workload].batch
    launches = step(
        *(job.workload, job.dtype, job.limits, batch), divides=job.divides, layers=job.layers
    ).kernels
    unique = [*{launch.compilation: launch for launch in launches}.values()]
    failed = []
    mine = unique[job.first :: job.every]
    for launch in mine:
        try:
            compiled = launch.compile(job.limits.capability)
            if job.launchers:
                build_launcher(compiled)
        except Exception as reason:
            failed.append((launch.name, f"failed: {type(reason).__name__}: {reason}"[:300]))
    return len(mine), failed


def build_launcher(kernel: Any) -> None:
    """Build the C code that launches a compiled kernel, where there is any of its own."""
    # Late: it is the vendor's.
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        driver.CudaLauncher(kernel.src, kernel.metadata)


def _card(device: str) -> tuple[DeviceLimits, int]:
    """The limits that launchers read, and the bytes of L2; an A100's where there is no GPU."""
    if device == "cpu":
        return DeviceLimits(108, 80), 40 * 2**20
    found = torch.cuda.get_device_properties(0)
    capability = 10 * found.major + found.minor
    limits = DeviceLimits(found.multi_processor_count, capability, found.name)
    return limits, found.L2_cache_size
