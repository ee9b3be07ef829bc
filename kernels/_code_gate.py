"""The machine code of the paper's workloads, and the bounds that it must keep.

What those workloads launch is recorded by `bench.launches`, so this runs in a clone alone. A bound
is what was counted when `bounds.json` was written: fewer instructions pass, more do not.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ._launch import DeviceLimits
from ._machine_code import count, disassemble
from ._record import Launch

BOUNDS = Path(__file__).with_name("bounds.json")
# Multiprocessors of the card that launchers choose for: A100, RTX 3090 and 4090, H100, RTX 5090.
CARDS = {arch: DeviceLimits(n, arch) for arch, n in
         {80: 108, 86: 82, 89: 128, 90: 132, 120: 170}.items()}  # fmt: skip
DTYPES = ("bfloat16", "tf32")
# What a layer's product is called where each is the dtype.
PRODUCTS = {"bfloat16": "half", "tf32": "tf32", "float32": "ieee"}
# Tensors of at least so many bytes are stacks; weights and sums are smaller.
_STACK = 2**19


class Multiprocessor(NamedTuple):
    """What programs share: KiB of shared memory, warps and programs; 65,536 registers on each."""

    shared_kib: int
    warps: int
    programs: int


MULTIPROCESSORS = {
    80: Multiprocessor(164, 64, 32),
    86: Multiprocessor(100, 48, 16),
    89: Multiprocessor(100, 48, 24),
    90: Multiprocessor(228, 64, 32),
    120: Multiprocessor(100, 48, 24),
}


@dataclass(frozen=True)
class CodeRow:
    """The machine code of one launch.

    Attributes:
        name: workload, dtype, kernel and the shapes of its two largest tensors.
        arch: compute capability, 86 for 8.6.
        programs: of the launch.
        warps: of a program.
        tensor: its tensor-core instruction, "" without one.
        loop: instructions in the innermost loop that issues most of those, for each of them; 0.0
            without one.
        whole: instructions that a warp issues from first to last, for each tensor-core one; without
            any, their number.
        load: bytes of the narrowest load of a stack by one thread, 0 without one.
        store: likewise.
        accesses: of device memory by a warp, by instruction.
        round_trips: instructions on shared memory in the loop, by instruction.
        registers: of a thread.
        shared: bytes of a program.
        stack: bytes of spills of a thread.
        resident: programs that an SM holds at a time.
        followed: whether all of its branches could be followed; else `whole` is 0, not known.
        issued: instructions of a warp.
        flops: of them, of products.
    """

    name: str
    arch: int
    programs: int
    warps: int
    tensor: str
    loop: float
    whole: float
    load: int
    store: int
    accesses: Mapping[str, int]
    round_trips: Mapping[str, int]
    registers: int
    shared: int
    stack: int
    resident: int
    followed: bool
    issued: int
    flops: int

    @property
    def bound(self) -> list[float]:
        """What `bounds.json` keeps of it, in the order of `BOUNDED`."""
        return [getattr(self, name) for name, _ in BOUNDED[:-1]] + [sum(self.round_trips.values())]


# What is bounded, and in which direction it may move.
BOUNDED = (
    *(("loop", 1), ("whole", 1), ("load", -1), ("store", -1)),
    *(("registers", 1), ("shared", 1), ("round_trips", 1)),
)


def resident(arch: int, registers: int, shared: int, warps: int) -> int:
    """Programs that one SM holds at a time, by registers, shared memory and warps."""
    has = MULTIPROCESSORS[arch]
    by_registers = 2**16 // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = has.shared_kib * 1024 // (shared + 1024)
    return min(by_registers, by_shared, has.warps // warps, has.programs)


def labels(launches: Sequence[Launch]) -> list[str]:
    """Kernel and the shapes of its two largest tensors; the second of two alike is "#2"."""
    found, seen = [], Counter[str]()
    for launch in launches:
        memories = launch.memories.values()
        largest = sorted(memories, key=lambda m: -m.bytes)[:2]
        shapes = ["x".join(map(str, m.shape)) for m in memories if m in largest]
        label = " ".join((launch.name, *shapes))
        seen[label] += 1
        found.append(label if seen[label] == 1 else f"{label} #{seen[label]}")
    return found


def code_row(name: str, launch: Launch, arch: int) -> CodeRow:
    """Compile a launch for ``sm_<arch>`` and count."""
    compiled = launch.compile(arch)
    code = disassemble(compiled.asm["cubin"])
    counts = count(code, launch, arch)
    tensor = sum(counts.tensor.values())
    narrowest = {"load": 0, "store": 0}
    for (argument, kind), width in counts.widths.items():
        memory = launch.memories.get(argument)
        if memory is not None and memory.bytes >= _STACK:
            narrowest[kind] = min(width, narrowest[kind] or 16)
    return CodeRow(
        name=name,
        arch=arch,
        programs=launch.programs,
        warps=launch.num_warps,
        tensor=max(counts.tensor, key=counts.tensor.__getitem__, default=""),
        loop=round(counts.loop / counts.loop_tensor, 2) if counts.loop_tensor else 0.0,
        whole=0.0 if counts.unknown else round(counts.issued / (tensor or 1), 2),
        **narrowest,
        accesses=counts.accesses,
        round_trips=counts.round_trips,
        registers=code.registers,
        shared=compiled.metadata.shared,
        stack=code.stack,
        resident=resident(arch, code.registers, compiled.metadata.shared, launch.num_warps),
        followed=not counts.unknown,
        issued=counts.issued,
        flops=counts.flops,
    )


def recorded_step(workload: str, dtype: str, arch: int) -> list[tuple[str, Launch]]:
    """Names and launches of a step, those of equal names and machine code once.

    Raises:
        ModuleNotFoundError: outside of a clone.
    """
    launches = importlib.import_module("bench.launches").step(workload, dtype, CARDS[arch]).kernels
    unique: dict[tuple, Launch] = {}
    for launch in launches:
        shapes = tuple(m.shape for m in launch.memories.values())
        unique.setdefault((launch.compilation, shapes), launch)
    found = list(unique.values())
    return [
        (f"{workload} {dtype} {label}", x) for label, x in zip(labels(found), found, strict=True)
    ]


def _rows_of(job: tuple[str, str, int, Sequence[str]]) -> list[CodeRow]:
    workload, dtype, arch, names = job
    chosen = [
        (name, launch)
        for name, launch in recorded_step(workload, dtype, arch)
        if any(part in launch.name for part in names)
    ]
    return [code_row(name, launch, arch) for name, launch in chosen]


def code_rows(
    archs: Iterable[int],
    names: Sequence[str] = ("",),
    workloads: Sequence[str] | None = None,
    dtypes: Sequence[str] = DTYPES,
) -> list[CodeRow]:
    """The machine code of the workloads' launches, on as many cores as allowed.

    Args:
        archs: compute capabilities, 86 for 8.6.
        names: parts of kernels' names.
        workloads: None for the paper's.
        dtypes: some of `DTYPES`.
    """
    chosen = workloads or importlib.import_module("bench.launches").PAPER
    jobs = [(w, d, arch, names) for arch in archs for w in chosen for d in dtypes]
    context = multiprocessing.get_context("spawn")
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return [row for rows in pool.map(_rows_of, jobs) for row in rows]


def read_bounds() -> dict[str, dict[str, Any]]:
    """By architecture and name: the tensor-core instruction, then `BOUNDED`'s numbers."""
    return json.loads(BOUNDS.read_text())


def write_bounds(rows: Sequence[CodeRow]) -> None:
    """Make what was counted the bound of those steps on those cards; others keep theirs."""
    counted = {(row.arch, _step_of(row.name)) for row in rows}
    bounds: dict[str, dict[str, Any]] = {str(arch): {} for arch in CARDS}
    for arch, of in read_bounds().items():
        # What these steps no longer launch is dropped.
        kept = {n: b for n, b in of.items() if (int(arch), _step_of(n)) not in counted}
        bounds[arch].update(kept)
    for row in rows:
        bounds[str(row.arch)][row.name] = [row.tensor, *row.bound]
    # One launch a line, for whoever reads what a change has changed.
    parts = [
        f'"{arch}": {{\n'
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(of[name])}" for name in sorted(of))
        + "\n}"
        for arch, of in bounds.items()
        if of
    ]
    BOUNDS.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def _step_of(name: str) -> str:
    """Workload and dtype of a row's name."""
    return " ".join(name.split()[:2])


def write_issued(rows: Sequence[CodeRow], path: Path) -> None:
    """What the model of a layer's time knows of these kernels: FLOPs of one issued instruction.

    Args:
        rows: of celeba16, its dtypes among `PRODUCTS`.
        path: a JSON file, by architecture and product; what was not counted keeps its number.
    """
    sums: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        workload, dtype, kernel, *_ = row.name.split()
        if workload == "celeba16" and kernel.startswith("tangent_") and row.followed:
            total = sums.setdefault((str(row.arch), PRODUCTS[dtype]), [0, 0])
            total[0] += row.programs * row.warps * row.flops
            total[1] += row.programs * row.warps * row.issued
    found = json.loads(path.read_text())
    for (arch, product), (flops, issued) in sums.items():
        found.setdefault(arch, {})[product] = round(flops / issued, 1)
    path.write_text(
        json.dumps(dict(sorted(found.items(), key=lambda i: int(i[0]))), indent=1) + "\n"
    )


def broken(rows: Sequence[CodeRow], bounds: Mapping[str, Mapping[str, Any]] | None) -> list[str]:
    """A line for each bound that a row does not keep, and for each row without bounds.

    Without `bounds`, a line for each row that spills.
    """
    lines = []
    for row in rows:
        where = f"sm_{row.arch} {row.name}"
        if row.stack:
            lines.append(f"{where}: {row.stack} bytes of spills")
        if bounds is None:
            continue
        known = bounds.get(str(row.arch), {}).get(row.name)
        if known is None:
            lines.append(f"{where}: has no bounds yet: run --write-bounds")
            continue
        tensor, *limits = known
        if tensor and not row.tensor:
            lines.append(f"{where}: no tensor-core instruction in place of {tensor}")
        for (name, sign), value, limit in zip(BOUNDED, row.bound, limits, strict=True):
            if sign * value > sign * limit:
                lines.append(f"{where}: {name} {value:g} where {limit:g} was counted")
    return lines


def code_table(rows: Sequence[CodeRow]) -> list[tuple[str, ...]]:
    """Cells of the printed table, its head first."""
    head = "name,sm,tensor-core instruction,loop,whole,load,store,device memory,shared memory"
    lines: list[tuple[str, ...]] = [(*head.split(","), "regs", "shared", "spills", "an SM")]

    def listed(counts: Mapping[str, int]) -> str:
        return " ".join(f"{opcode}:{n}" for opcode, n in counts.items())

    for row in rows:
        lines.append(
            (
                *(
                    row.name,
                    str(row.arch),
                    row.tensor,
                    f"{row.loop:g}",
                    f"{row.whole:g}" if row.followed else "?",
                ),
                *(str(row.load), str(row.store), listed(row.accesses), listed(row.round_trips)),
                *map(str, (row.registers, row.shared, row.stack, row.resident)),
            )
        )
    return lines


def as_json(rows: Sequence[CodeRow]) -> str:
    """All that was counted."""
    return json.dumps([asdict(row) for row in rows], indent=1)
