"""Machine code as nvdisasm prints it, and what of it one warp issues.

Counting needs trips, and trips need no GPU: one thread of one program of a recorded launch is
followed through the code, its integers and predicates computed from the launch's own arguments and
the program's number. All else (what is loaded, floats) is unknown, and no loop of a product
or a sum ends on it. So "whole program" means: all instructions that this thread's warp issues from
the first to its exit, whether their predicate holds or not.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import triton

from ._record import Launch
from ._warp import Warp
from ._warp_arithmetic import step

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")
# What some disassemblers print behind the operands: what an instruction waits for.
_WAITS = re.compile(r"(?:^|\s+)[&?][A-Za-z].*")
_LABEL = re.compile(r"^\s*([.$][\w.$]+):")
_TARGET = re.compile(r"`\(([.$][\w.$]+)\)")
_PLAIN = re.compile(r"FFMA(?:\.|$)")
TENSOR = re.compile(r"(?:HMMA|HGMMA|IMMA|DMMA)\.")
_SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.|HMMA\.168(\d+)\.")
_GLOBAL = re.compile(r"(?:LDG|STG|LDGSTS)\.")
_SHARED = re.compile(r"(?:LDS|STS|LDSM|STSM)(?:\.|$)")
# Bytes that one thread moves by each modifier; 4 without one.
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
# A program that is not done by then runs in a circle.
MOST = 500_000


@dataclass(frozen=True)
class Instruction:
    """One line of machine code.

    Attributes:
        predicate: under which it acts, as in "!P0"; "" where it always does.
        opcode: with its modifiers.
        operands: as printed.
        target: where it jumps to, an index; None elsewhere.
    """

    predicate: str
    opcode: str
    operands: tuple[str, ...]
    target: int | None = None

    @property
    def width(self) -> int:
        """Bytes that one thread moves, of an access to memory."""
        return next((_WIDTHS[m] for m in self.opcode.split(".") if m in _WIDTHS), 4)


@dataclass(frozen=True)
class Code:
    """A kernel's machine code.

    Attributes:
        instructions: in the order of their addresses.
        registers: of a thread.
        stack: bytes of spills of a thread.
    """

    instructions: tuple[Instruction, ...]
    registers: int
    stack: int

    @property
    def loops(self) -> list[tuple[int, int]]:
        """First and last index of each, from where a branch jumps back to the branch."""
        return sorted(
            {
                (i.target, at)
                for at, i in enumerate(self.instructions)
                if i.opcode.startswith("BRA") and i.target is not None and i.target < at
            }
        )

    def follow(self, launch: Launch, arch: int, thread: int = 0) -> Followed:
        """Follow a thread of the launch's middle program from the first instruction to its exit.

        Where a flag in memory decides over an exit, as in a rescue, the program leaves; over any
        other branch, it goes straight on.

        Raises:
            RuntimeError: a program that does not end.
        """
        program = (*(extent // 2 for extent in launch.grid), 0, 0)[:3]
        warp = Warp(arch, launch.arguments, program, 32 * launch.num_warps, thread)
        found, at, calls = Followed(), 0, []
        for _ in range(MOST):
            i = self.instructions[at]
            found.issued[at] += 1
            acts, base = warp.predicate(i.predicate), i.opcode.split(".")[0]
            if base == "EXIT" and acts is not False or i.target == at:
                return found
            if base in ("BRA", "CALL", "RET"):
                acts = warp.branch(acts, i.opcode, i.operands)
                if acts is None:
                    found.unknown.append(at)
                elif acts and base == "RET":
                    at = calls.pop()
                    continue
                elif acts and i.target is not None:
                    if base == "CALL":
                        calls.append(at + 1)
                    at = i.target
                    continue
            elif _GLOBAL.match(i.opcode):
                # A copy to shared memory is masked by a predicate behind its operands.
                masked = warp.branch(acts, i.opcode, i.operands) is False
                found.accesses.append(Access(at, warp.address(i.operands), masked))
            step(warp, acts, i.opcode, i.operands)
            at += 1
        if found.unknown:
            # One of those branches was the way out.
            return found
        raise RuntimeError(f"{launch.name}: no end after {MOST} instructions")


class Access(NamedTuple):
    """An instruction on device memory, as a thread comes by it.

    Attributes:
        instruction: its index.
        address: where it goes, None where unknown.
        masked: whether the thread is known to take no part.
    """

    instruction: int
    address: int | None
    masked: bool


@dataclass(frozen=True)
class Followed:
    """What a thread went through.

    Attributes:
        issued: how often each instruction, by index.
        accesses: of device memory, in order.
        unknown: branches that it could not decide, by index.
    """

    issued: Counter[int] = field(default_factory=Counter)
    accesses: list[Access] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Counts:
    """What one warp does, from the machine code of one launch.

    Attributes:
        issued: instructions of the whole program.
        tensor: of them, tensor-core instructions, by opcode.
        loop: instructions of the innermost loop that issues most of those; 0 without one.
        loop_tensor: tensor-core instructions in it.
        trips: how often it runs.
        round_trips: instructions on shared memory in it, by opcode.
        flops: of tensor-core instructions, or without any of plain ones.
        accesses: of device memory in the whole program, by opcode.
        widths: bytes that a thread moves at once in most of its accesses, by (argument, "load" or
            "store").
        unknown: branches that could not be followed.
    """

    issued: int
    tensor: Mapping[str, int]
    loop: int
    loop_tensor: int
    trips: int
    round_trips: Mapping[str, int]
    flops: int
    accesses: Mapping[str, int]
    widths: Mapping[tuple[str, str], int]
    unknown: int


def disassemble(cubin: bytes) -> Code:
    """Read a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = _run(triton.knobs.nvidia.nvdisasm.path, "-c", str(path))
        usage = resource_usage(path)
    return Code(parse(text), usage["REG"], usage["STACK"] + usage["LOCAL"])


def resource_usage(path: Path) -> dict[str, int]:
    """REG, STACK and LOCAL of a compiled kernel in a file."""
    text = _run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(text: str) -> tuple[Instruction, ...]:
    """The instructions of nvdisasm's listing."""
    lines: list[tuple[str, str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif found := _INSTRUCTION.match(line):
            lines.append((found[2] or "", found[3], _WAITS.sub("", found[4])))
    return tuple(
        Instruction(predicate, opcode, _operands(rest), _target(rest, labels))
        for predicate, opcode, rest in lines
    )


def _operands(text: str) -> tuple[str, ...]:
    return tuple(part.strip().removesuffix(".reuse") for part in text.split(",")) if text else ()


def _target(text: str, labels: Mapping[str, int]) -> int | None:
    found = _TARGET.search(text)
    return labels.get(found[1]) if found else None


def count(code: Code, launch: Launch, arch: int) -> Counts:
    """Follow the first thread of a launch and sum up."""
    followed = code.follow(launch, arch)
    issued = followed.issued

    def by_opcode(pattern: re.Pattern[str], among: Callable[[int], int]) -> dict[str, int]:
        found: Counter[str] = Counter()
        for at, i in enumerate(code.instructions):
            if pattern.match(i.opcode):
                found[i.opcode] += among(at)
        return {opcode: n for opcode, n in found.items() if n}

    def tensor_in(loop: tuple[int, int]) -> int:
        body = range(loop[0], loop[1] + 1)
        return sum(issued[at] for at in body if TENSOR.match(code.instructions[at].opcode))

    # Innermost first, of several that issue as many.
    loops = sorted((p for p in code.loops if issued[p[1]]), key=lambda loop: loop[1] - loop[0])
    first, last = max(loops, key=tensor_in, default=(0, -1))
    if last < 0 or not tensor_in((first, last)):
        first, last = 0, -1

    def inside(at: int) -> int:
        return first <= at <= last

    tensor = by_opcode(TENSOR, issued.__getitem__)
    products = tensor or by_opcode(_PLAIN, issued.__getitem__)
    return Counts(
        issued=sum(issued.values()),
        tensor=tensor,
        loop=last - first + 1,
        loop_tensor=sum(by_opcode(TENSOR, inside).values()),
        trips=issued[last],
        round_trips=by_opcode(_SHARED, inside),
        flops=sum(flops_of(opcode) * n for opcode, n in products.items()),
        accesses=by_opcode(_GLOBAL, issued.__getitem__),
        widths=_widths_of(code, launch, followed),
        unknown=len(followed.unknown),
    )


def flops_of(opcode: str) -> int:
    """Of one warp's share in a tensor-core instruction, or in one of plain float32; 0 of others."""
    if opcode.split(".")[0] == "FFMA":
        return 2 * 32
    found = _SHAPE.match(opcode)
    if not found:
        return 0
    if found[1]:
        # Four warps issue it together.
        return 2 * int(found[1]) * int(found[2]) * int(found[3]) // 4
    return 2 * 16 * 8 * int(found[4])


def argument_at(launch: Launch, address: int | None) -> str:
    """The tensor that an address lies in, or nearest to; "?" where neither."""
    if address is None:
        return "?"
    far = {
        name: max(m.address - address, address - m.stop, 0) for name, m in launch.memories.items()
    }
    name = min(far, key=far.__getitem__, default="?")
    # A masked access may lie a row or two outside.
    return name if name != "?" and far[name] < 2**16 else "?"


def _widths_of(code: Code, launch: Launch, followed: Followed) -> dict[tuple[str, str], int]:
    moved: dict[tuple[str, str], Counter[int]] = {}
    for at, address, _ in followed.accesses:
        i = code.instructions[at]
        key = argument_at(launch, address), "store" if i.opcode.startswith("ST") else "load"
        moved.setdefault(key, Counter())[i.width] += i.width
    return {key: widths.most_common(1)[0][0] for key, widths in moved.items()}
