"""What the sweep tries, and the processes that compile it ahead: no GPU is needed there.

A kernel cannot be pickled, so a job names a case and fields of a tile; the process prepares the
case on the CPU, records what it launches with that tile, and compiles what the JIT would.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench import cases_kernels, cases_last_layer, cases_layers
from bench.cases_layers import DTYPES
from bench.launches import import_kernels
from bench.measure import Case, Run
from fastsfvae.kernels._launch import DeviceLimits
from fastsfvae.kernels._record import Launch, recorded
from fastsfvae.kernels._tiles import Asked, Fields, trying
from fastsfvae.kernels.audit import SHARED_KIB, cubin_usage

# Of the fused layers: of their backward each gradient by itself, which is one launch.
MODES = ("forward", "data gradient", "weight gradient")
FUSED = ("fused", "gram_tail", "fastsfvae[triton]")
# Registers that a thread may be bound to; None is no bound.
_BOUNDS = (64, 96, 128, 168, 255, None)
# Begins the problem of a tile that wants more registers, and so many of them it is tried with then.
SPILLS, _MOST_REGISTERS = "spills", 255
# So many fields that are each faster are tried together.
TOGETHER = 3


class Job(NamedTuple):
    """Tiles of one launch of a case.

    Attributes:
        labels: of the case.
        quick: as in `cases`.
        key: of the launch.
        tries: fields that are others.
        limits: of the card.
    """

    labels: Mapping[str, str]
    quick: bool
    key: str
    tries: Sequence[Fields]
    limits: DeviceLimits


class Compiled(NamedTuple):
    """What became of a tile.

    Attributes:
        problem: why it cannot be timed, or nothing.
        says: registers and shared memory.
    """

    problem: str
    says: str = ""


def cases(device: str, quick: bool) -> Iterator[Case]:
    """What is swept: the fused kernels' cases, in no order."""
    if quick:
        tiny = cases_layers.layers(device, ["tiny"], ["bfloat16"])
        yield from (c for c in tiny if c.implementation == "fused" and c.mode == MODES[0])
        return
    for case in (
        *cases_last_layer.last_layers(device),
        *cases_layers.layers(device),
        *cases_kernels.gram_project(device, ["m16"]),
    ):
        whole = case.op != cases_layers.OPERATION or case.mode in MODES
        if whole and case.implementation.startswith(FUSED):
            yield case


def rank(case: Case, times: Mapping[tuple[str, ...], float], bytes_per_ms: float) -> tuple:
    """Sorts cases by what they weigh: bfloat16 first, as it decides most, then by time.

    Args:
        case: of `cases`.
        times: milliseconds by a case's labels, where they were measured.
        bytes_per_ms: what a case that was not measured is taken to move.
    """
    guessed = (case.bytes or 0) / bytes_per_ms
    return DTYPES.index(case.dtype), -times.get(tuple(case.labels.values()), guessed)


def weighs(case: Case, key: str) -> bool:
    """Whether a launch is one that a case is of; beside a last layer's there are small ones."""
    small = ("tangent_product ", "tangent_weight ")
    return case.op != cases_last_layer.OPERATION or not key.startswith(small)


def neighbours(asked: Asked) -> list[dict[str, Any]]:
    """Tiles that differ from a launch's in one field."""
    tile = asdict(asked.tile)
    values: dict[str, list[Any]] = {}
    for name, least in asked.blocks.items():
        values[name] = [2 * tile[name], *[tile[name] // 2] * (tile[name] // 2 >= least)]
    for name, most in (("num_warps", 16), ("programs", 32)):
        if name in tile:
            values[name] = [n for n in (2 * tile[name], tile[name] // 2) if 1 <= n <= most]
    values["num_stages"] = [n for n in (tile["num_stages"] + 1, tile["num_stages"] - 1) if n]
    values["maxnreg"] = _bounds_beside(tile["maxnreg"])
    if "by_l1" in tile:
        values["by_l1"] = [not tile["by_l1"]]
    return [{name: value} for name, of in values.items() for value in of]


def _bounds_beside(bound: int | None) -> list[int | None]:
    at = float("inf") if bound is None else bound
    below = [n for n in _BOUNDS if n is not None and n < at]
    above = [n for n in _BOUNDS if (float("inf") if n is None else n) > at]
    return [*below[-1:], *above[:1]]


def combined(
    asked: Asked, ratios: Sequence[tuple[float, Fields]], spilt: Sequence[Fields] = ()
) -> list[dict[str, Any]]:
    """Tiles of several fields that are each faster, and the fastest field once more.

    What has spilt under a bound of registers is tried without that.

    Args:
        asked: the launch.
        ratios: of each field that was tried, its time over that of the tile as it is.
        spilt: fields that were not timed for want of registers.
    """
    best: dict[str, tuple[float, Any]] = {}
    for ratio, fields in ratios:
        ((name, value),) = fields.items()
        if ratio < min(0.99, best.get(name, (1.0,))[0]):
            best[name] = (ratio, value)
    names = sorted(best, key=lambda name: best[name][0])[:TOGETHER]
    found = [
        {name: best[name][1] for name in chosen}
        for count in range(len(names), 1, -1)
        for chosen in itertools.combinations(names, count)
    ]
    if names and names[0] in asked.blocks:
        was, now = getattr(asked.tile, names[0]), best[names[0]][1]
        further = now * 2 if now > was else now // 2
        found += [{names[0]: further}] * (further >= asked.blocks[names[0]])
    if (asked.tile.maxnreg or _MOST_REGISTERS) < _MOST_REGISTERS:
        free = {"maxnreg": _MOST_REGISTERS}
        found += [{**fields, **free} for fields in spilt if "maxnreg" not in fields]
    return found


def compile_tries(job: Job) -> list[Compiled]:
    """Compile a job's tiles for its card, in their order."""
    run, usual = _recorded_case(tuple(job.labels.items()), job.quick, job.limits)
    return [_compiled(run, usual, job, fields) for fields in job.tries]


@functools.lru_cache(maxsize=1)
def _recorded_case(
    labels: tuple[tuple[str, str], ...], quick: bool, limits: DeviceLimits
) -> tuple[Run, list[Launch]]:
    """A case on the CPU, and what it launches as it is."""
    import_kernels()
    case = next(case for case in cases("cpu", quick) if case.labels == dict(labels))
    # Nothing runs, so numbers need not be drawn.
    with _recording(limits), mock.patch.object(torch, "randn", _blank):
        run = case.prepare().runs[0]
    with _recording(limits) as launches:
        run()
    return run, launches


def _blank(*shape: Any, device: Any = None, **_: Any) -> torch.Tensor:
    return torch.zeros(*shape, device=device)


@contextlib.contextmanager
def _recording(limits: DeviceLimits) -> Iterator[list[Launch]]:
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), recorded(limits) as launches:
        yield launches


def _compiled(run: Run, usual: Sequence[Launch], job: Job, fields: Fields) -> Compiled:
    try:
        with trying({job.key: fields}), _recording(job.limits) as launches:
            run()
    except ValueError as reason:
        return Compiled(f"refused: {reason}")
    if [(x.compilation, x.grid) for x in launches] == [(x.compilation, x.grid) for x in usual]:
        return Compiled("the same launch")
    usage = {"REG": 0, "STACK": 0, "LOCAL": 0, "shared": 0}
    others = {launch.compilation for launch in usual}
    for launch in {x.compilation: x for x in launches if x.compilation not in others}.values():
        try:
            compiled = launch.compile(job.limits.capability)
        except Exception as reason:
            lines = str(reason).strip().splitlines() or [""]
            return Compiled(f"does not compile: {type(reason).__name__}: {lines[0]}"[:200])
        of = cubin_usage(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}
        usage = {name: max(value, of.get(name, 0)) for name, value in usage.items()}
    says = f"{usage['REG']} registers, {usage['shared'] / 1024:.0f} KiB" if usage["REG"] else ""
    if spilt := usage["STACK"] + usage["LOCAL"]:
        return Compiled(f"{SPILLS} {spilt} bytes: {says}")
    if usage["shared"] > shared_bytes(job.limits.capability):
        return Compiled(f"wants more shared memory than there is: {says}")
    return Compiled("", says)


def shared_bytes(capability: int) -> int:
    """Shared memory that one program can have; of an unknown card, as of the one before it."""
    return 1024 * SHARED_KIB[max(known for known in SHARED_KIB if known <= capability)]
