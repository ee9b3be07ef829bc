"""The time of each kernel of a step, from its machine code and a card's data sheet.

A kernel takes the longest of five:

    tensor    its tensor-core instructions at the rate that their kind reaches, padding and all
    issue     a warp instruction a clock on each of an SM's four schedulers
    L2        the 32-byte sectors that its programs ask L2 for
    DRAM      each tensor that it is given, once; of a launch on a part of them, what it asks for;
              nothing of what it reads and L2 has kept (`bench.l2_cache`)
    latency   waves of programs, times the accesses of one that wait for one another

the first two of the SM that has most programs, and a step the sum of its kernels, and a launch
each. Of PyTorch's own launches the bytes are counted. Instructions, sectors and bytes are counted:
the launches are recorded without a GPU and compiled, and threads of their middle programs followed.
Guesses stand in `GUESSES` and `_L2_RATES`; no card has confirmed them. What a step takes where
nothing stays in L2 from one launch to the next is printed beside it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from bench.l2_cache import L2_BYTES, L2_SHARE, L2Cache, Span
from bench.launches import Other, divides_with, step
from fastsfvae.jacobian.cost import CARDS, Card
from fastsfvae.kernels._code_gate import CARDS as LIMITS
from fastsfvae.kernels._code_gate import labels, resident
from fastsfvae.kernels._machine_code import Access, Code, Followed, count, disassemble
from fastsfvae.kernels._record import Launch

SECTOR = 32
LAUNCH_SECONDS, LATENCY_CLOCKS = 2e-6, 600
GUESSES = (
    "guessed: L2's rate; every scheduler issues in every clock; what one program asks for again "
    f"through L1 is found there; {L2_SHARE:.0%} of L2 keep what was last used, all of a launch's "
    "tensors from front to back; instructions of one warp reach 0.62 of an H100's tensor peak; "
    f"{LATENCY_CLOCKS} clocks for an access; {1e6 * LAUNCH_SECONDS:g} us for a launch in a graph"
)
# Compute capability, clock rate by data sheet, and L2's bytes a second, a guess.
_L2_RATES = {
    "RTX 3090": (86, 1.695e9, 2.0e12),
    "RTX 4090": (89, 2.52e9, 4.5e12),
    "RTX 5090": (120, 2.41e9, 6.0e12),
    "H100": (90, 1.755e9, 5.5e12),
}
# Of the tensor cores' peak, what instructions of one warp reach where groups of warps have their
# own: 0.629 in published measurements of Hopper (arXiv 2402.13499).
_WARP_SHARE = {90: 0.62}
MODELLED = tuple(_L2_RATES)
DTYPES = "bfloat16", "tf32"


class Guesses(NamedTuple):
    """What the model takes a card for.

    Attributes:
        sheet: bandwidth and products' rates by data sheet.
        clock: of a multiprocessor, Hz, likewise.
        l2: its L2's bytes a second.
        launch: seconds of a launch in a graph.
    """

    sheet: Card
    clock: float
    l2: float
    launch: float


def guesses_of(device: str) -> Guesses | None:
    """Those for a device by the name that its driver gives; None of a card not in `MODELLED`."""
    for card in MODELLED:
        if card in device:
            _, clock, l2 = _L2_RATES[card]
            return Guesses(CARDS[card], clock, l2, LAUNCH_SECONDS)
    return None


@dataclass(frozen=True)
class KernelTime:
    """Seconds of one launch.

    Attributes:
        name: kernel and shapes.
        tensor: at the tensor cores' peak.
        issue: likewise, of the schedulers.
        l2: of L2.
        dram: of device memory, nothing kept in L2.
        latency: of waiting.
        launch: what was recorded.
        asked: bytes that its programs ask L2 for.
        written: its arguments that it writes.
        spared: seconds of `dram` that L2 spares, where it has kept what is read.
    """

    name: str
    tensor: float
    issue: float
    l2: float
    dram: float
    latency: float
    launch: Launch
    asked: int = 0
    written: frozenset[str] = frozenset()
    spared: float = 0.0

    @property
    def limits(self) -> dict[str, float]:
        """All five by name."""
        found = {n: getattr(self, n) for n in ("tensor", "issue", "l2", "dram", "latency")}
        return found | {"dram": self.dram - self.spared}

    @property
    def tightest(self) -> str:
        """What bounds it."""
        return max(self.limits, key=self.limits.__getitem__)

    @property
    def seconds(self) -> float:
        """The longest of the five."""
        return max(self.limits.values())

    @property
    def floor(self) -> float:
        """With a perfect kernel in its place: the same bytes, the same products."""
        return max(self.limits["dram"], self.tensor)

    def spans(self, launch: Launch) -> list[Span]:
        """The memory of a launch of the same kernel, of one on a part of it the front."""
        part = min(1.0, self.asked / max(1, launch.moved))
        found = []
        for name, m in launch.memories.items():
            starts, front = m.starts or (m.address,), int(part * m.bytes)
            each = m.bytes // len(starts)
            for at, start in enumerate(starts):
                size = min(each, max(0, front - at * each))
                found.append(Span(start, size, name in self.written))
        return found


def sector_bytes(code: Code, launch: Launch, arch: int) -> int:
    """Bytes that one program moves to and from L2, in whole sectors.

    A thread's addresses are the first one's and a term for each bit of its number, so that eight or
    nine threads tell all of them. What bypasses L1, and a store, counts each time; what goes
    through L1 once a program. An access that masks keep all of those threads from counts nothing,
    any other one in full.
    """
    threads = 32 * launch.num_warps
    first = code.follow(launch, arch)
    bits = [code.follow(launch, arch, 1 << bit) for bit in range(threads.bit_length() - 1)]
    addresses = _addresses(first, bits, threads)
    turns = [_by_turn(followed) for followed in (first, *bits)]
    kept, total = [], 0
    for (turn, access), of_threads in zip(turns[0].items(), addresses, strict=True):
        if all(turn not in of or of[turn].masked for of in turns):
            continue
        i = code.instructions[access.instruction]
        sectors = of_threads[:, None] + np.arange(0, i.width, min(i.width, SECTOR))
        sectors = (sectors // SECTOR).reshape(launch.num_warps, -1)
        if i.opcode.startswith("STG") or "BYPASS" in i.opcode:
            total += sum(len(np.unique(of_warp)) for of_warp in sectors)
        else:
            kept.append(sectors.ravel())
    return SECTOR * (total + (len(np.unique(np.concatenate(kept))) if kept else 0))


def _addresses(first: Followed, bits: list[Followed], threads: int) -> np.ndarray:
    """``[accesses, threads]``; an address that is not known is a place of its own."""
    number = np.arange(threads)
    columns = [_by_turn(followed) for followed in bits]
    found = np.zeros((len(first.accesses), threads), np.int64)
    for at, (turn, access) in enumerate(_by_turn(first).items()):
        base = access.address
        if base is None:
            found[at] = 16 * (number - (at + 1) * threads)
            continue
        found[at] = base
        for bit, column in enumerate(columns):
            # A thread that does not come by here adds nothing.
            moved = column[turn].address if turn in column else None
            found[at] += (number >> bit & 1) * ((base if moved is None else moved) - base)
    return found


def _by_turn(followed: Followed) -> dict[tuple[int, int], Access]:
    """Accesses by instruction and how often it came before."""
    seen: Counter[int] = Counter()
    found = {}
    for access in followed.accesses:
        found[access.instruction, seen[access.instruction]] = access
        seen[access.instruction] += 1
    return found


def kernel_time(name: str, launch: Launch, card: str, dtype: str) -> KernelTime:
    """Compile a launch for a card of `MODELLED` and compute its times."""
    arch, clock, l2_rate = _L2_RATES[card]
    sheet, sm_count = CARDS[card], LIMITS[arch].sm_count
    compiled = launch.compile(arch)
    code = disassemble(compiled.asm["cubin"])
    counts = count(code, launch, arch)
    # Warps of the SM that has most programs, times all SMs.
    warps = -(-launch.programs // sm_count) * sm_count * launch.num_warps
    at_a_time = sm_count * resident(
        arch, code.registers, compiled.metadata.shared, launch.num_warps
    )
    by_group = any(opcode.startswith("HGMMA") for opcode in counts.tensor)
    rate = sheet.rate(dtype) * (1.0 if by_group else _WARP_SHARE.get(arch, 1.0))
    # A loop's loads are on their way `stages - 1` trips ahead; one access before it, one behind.
    ahead = max(1, launch.options.get("num_stages", 3) - 1)
    waits = 2 + counts.trips / ahead
    asked = launch.programs * sector_bytes(code, launch, arch)
    return KernelTime(
        name=name,
        tensor=warps * (counts.flops if counts.tensor else 0) / rate,
        issue=warps * counts.issued / (4 * sm_count * clock),
        l2=asked / l2_rate,
        dram=min(launch.moved, asked) / sheet.bandwidth,
        latency=-(-launch.programs // at_a_time) * waits * LATENCY_CLOCKS / clock,
        launch=launch,
        asked=asked,
        written=frozenset(argument for argument, kind in counts.widths if kind == "store"),
    )


@dataclass(frozen=True)
class OtherTime:
    """Seconds of one of PyTorch's launches, of its bytes.

    Attributes:
        name: of the operation.
        l2: of L2.
        dram: of device memory, nothing kept in L2.
        spared: of `dram`, as in `KernelTime`.
    """

    name: str
    l2: float
    dram: float
    spared: float = 0.0

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.l2, self.dram - self.spared)


class StepTime(NamedTuple):
    """A step's kernels, and PyTorch's other launches."""

    kernels: list[KernelTime]
    others: list[OtherTime]

    @property
    def launches(self) -> int:
        """All of them."""
        return len(self.kernels) + len(self.others)

    @property
    def seconds(self) -> float:
        """Of all, and a launch each."""
        of_each = (x.seconds for x in (*self.kernels, *self.others))
        return sum(of_each) + LAUNCH_SECONDS * self.launches

    def forgetful(self) -> StepTime:
        """Nothing stays in L2 from one launch to the next."""
        return StepTime(*([replace(x, spared=0.0) for x in part] for part in self))


def step_time(
    workload: str, card: str, dtype: str, batch: int, *, divided: bool = False
) -> StepTime:
    """Decoder and loss, forward and backward, on a card of `MODELLED`.

    Args:
        workload: one of `bench.problems.WORKLOADS`.
        card: by name.
        dtype: "bfloat16" or "tf32".
        batch: samples, all in one chunk.
        divided: whether the last layers run on as few samples at a time as L2 holds.
    """
    arch, _, l2_rate = _L2_RATES[card]
    divides = L2_BYTES[card] if divided else 0
    recorded = step(workload, dtype, LIMITS[arch], batch, others=True, divides=divides)
    names = iter(labels(recorded.kernels))
    found: dict[tuple, KernelTime] = {}
    cache, bandwidth = L2Cache(L2_SHARE * L2_BYTES[card]), CARDS[card].bandwidth
    result = StepTime([], [])
    for launch in recorded.order:
        if isinstance(launch, Other):
            kept = cache.found(launch.spans) / bandwidth
            moved = launch.moved
            result.others.append(OtherTime(launch.name, moved / l2_rate, moved / bandwidth, kept))
            continue
        # Launches of the same code on as much memory take as long.
        name, key = next(names), (launch.compilation, launch.grid, launch.moved)
        if key not in found:
            found[key] = kernel_time(name, launch, card, dtype)
        time = found[key]
        kept = cache.found(time.spans(launch)) / bandwidth
        result.kernels.append(replace(time, name=name, launch=launch, spared=min(kept, time.dram)))
    return result


def lines_of(workload: str, card: str, dtype: str, batch: int, floor: float) -> list[str]:
    """The table of one card and dtype, in microseconds.

    Args:
        workload: as in `step_time`.
        card: likewise.
        dtype: likewise.
        batch: likewise.
        floor: of the whole step, in seconds, whatever kernels it has.
    """
    found = step_time(workload, card, dtype, batch)
    heads = "tensor", "issue", "L2", "DRAM", "latency", "us", "floor", "spared"
    lines = [f"{card}, {dtype}: us", " ".join(f"{head:>7s}" for head in heads) + "  bound by"]
    for k in found.kernels:
        numbers = (*k.limits.values(), k.seconds, k.floor, k.spared)
        lines.append(" ".join(f"{1e6 * n:7.1f}" for n in numbers) + f"  {k.tightest:7s}  {k.name}")
    lines += _sums(found)
    lines.append(f"the floor of any {1e3 * floor:.3f} ms")
    if divides_with(L2_BYTES[card]):
        parts = step_time(workload, card, dtype, batch, divided=True)
        lines += ["the last layers a few samples at a time, as in a captured step:", *_sums(parts)]
        lines.append(_pays(found, parts))
    return lines


def _pays(whole: StepTime, parts: StepTime) -> str:
    """Whether the second of two steps, of more launches, is the faster one."""
    gained, more = whole.seconds - parts.seconds, parts.launches - whole.launches
    even = LAUNCH_SECONDS + gained / more
    return (
        f"that {'pays' if gained > 0 else 'does not pay'}: {1e6 * gained:+.0f} us gained, by {more}"
        f" more launches; it pays below {1e6 * even:.1f} us a launch"
    )


def _sums(found: StepTime) -> list[str]:
    """Of a step, L2 keeping what it can, and nothing."""
    lines = []
    for says, step_of in (("L2 keeps", found), ("nothing stays in L2", found.forgetful())):
        kernels, others = (1e3 * sum(x.seconds for x in part) for part in step_of)
        floor = 1e3 * sum(k.floor for k in step_of.kernels)
        read = 1e6 * sum(x.spared for part in step_of for x in part)
        says += f" {read:.0f} us of DRAM" if read else ""
        lines.append(
            f"{says}: kernels {kernels:.3f} ms, PyTorch's {others:.3f} ms, with {found.launches} "
            f"launches ({len(found.kernels)} of these kernels) {1e3 * step_of.seconds:.3f} ms; with"
            f" perfect kernels in their place {floor:.3f} ms"
        )
    return lines
