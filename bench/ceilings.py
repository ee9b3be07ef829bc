"""What this device can do at most, measured: copies, products, small kernels; and how it fares.

The copy of memory and the products bound what other rows can reach (`bench.ledger.ceiling`). What
else there is, on a GPU, tells how far `bench.kernel_model` guesses right: `compared`. Random data
on purpose: products of zeros run faster than any real ones.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping

import torch

from bench.ledger import COPY, PRODUCT, ceiling
from bench.measure import Case, Context, Prepared, why
from bench.problems import products, relative_error

# float32, with TF32 products, and bfloat16: the names that other rows carry as their dtype.
PRODUCTS = ("float32", "tf32", "bfloat16")
L2, NODE, CARD = "copy in L2", "small kernel", "card"
# When the card is asked how it fares.
BEFORE, WITHIN, AFTER = "before products", "within products", "after products"
# Runs of one graph: neither its launch nor what it finds in L2 at first counts.
_COPIES, _NODES = 50, 100
# Kept busy for so long, and of so many products at most, while it is asked how it fares.
_BUSY_SECONDS, _MOST_PRODUCTS = 1.5, 1000
_ASKED = "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"
# Of a new driver and of one before.
_REASONS = "clocks_event_reasons.active", "clocks_throttle_reasons.active"
# The bits of either, as the driver's header has them.
_HELD_BACK = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}

_L2_ALONE = "L2 without gaps"
# What is told of, in this order: how it is called, its unit and what that is.
_COMPARED = {
    "copy": ("device memory, copied", "TB/s", 1e12),
    L2: ("L2, copied", "TB/s", 1e12),
    _L2_ALONE: ("L2, copied, less a small kernel's time", "TB/s", 1e12),
    "bfloat16": ("bfloat16 products", "TFLOP/s", 1e12),
    "tf32": ("TF32 products", "TFLOP/s", 1e12),
    "float32": ("float32 products", "TFLOP/s", 1e12),
    "clock": ("clock within bfloat16 products", "MHz", 1e6),
    NODE: ("a small kernel of a graph", "us", 1e-6),
}


def part(context: Context) -> None:
    """Measure the copy and the products; on a GPU, and to try the code, all else."""
    tells, device = context.device == "cuda" or context.quick, context.device
    context.run(copy_case(device, context.quick))
    if tells:
        _tell(context, BEFORE, lambda: how_it_fares(device))
    milliseconds = 0.0
    for name in PRODUCTS:
        with products(name):
            timings = context.run(product_case(device, context.quick, name))
        milliseconds = next((timing.p50 for timing in timings.values()), 0.0)
    if not tells:
        return
    _tell(context, WITHIN, lambda: _busy(context, milliseconds))
    _tell(context, AFTER, lambda: how_it_fares(device))
    context.run(node_case(device))
    if device == "cuda":
        context.run(l2_case(device, torch.cuda.get_device_properties(0).L2_cache_size))
    else:
        _tell(context, "forward", lambda: "not measured: no size of a CPU's L2 is told", L2)


def copy_case(device: str, quick: bool) -> Case:
    """A tensor far larger than any cache into another."""
    numel = 2**16 if quick else 2**28 if device == "cuda" else 2**26

    def prepare() -> Prepared:
        source = torch.randn(numel, device=device)
        target = torch.full_like(source, float("nan"))
        return Prepared(
            [lambda: (target.copy_(source),)],
            lambda outputs: 0.0 if torch.equal(outputs[0], source) else float("nan"),
        )

    labels = "ceiling", COPY, "forward", f"n={numel}", "float32"
    return Case(*labels, prepare, bytes=2 * 4 * numel)


def product_case(device: str, quick: bool, name: str) -> Case:
    """A square product, large enough that its arithmetic alone counts."""
    size = 128 if quick else 8192 if device == "cuda" else 2048
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32

    def prepare() -> Prepared:
        g = torch.Generator(device).manual_seed(0)
        a, b = (torch.randn(size, size, generator=g, device=device).to(dtype) for _ in range(2))

        def error(outputs):
            want = a[:64].double() @ b.double()
            return relative_error([outputs[0][:64]], [want])

        return Prepared([lambda: (torch.mm(a, b),)], error)

    labels = "ceiling", PRODUCT, "forward", f"{size}x{size}x{size}", name
    return Case(*labels, prepare, flops=2 * size**3)


def node_case(device: str) -> Case:
    """One of a chain of small kernels in a graph, each of which waits for the one before."""

    def prepare() -> Prepared:
        x = torch.ones(1024, device=device)
        # Whatever the number of runs.
        return Prepared(
            [lambda: (x.neg_(),)] * _NODES,
            lambda outputs: 0.0 if bool((outputs[0].abs() == 1).all()) else float("nan"),
        )

    labels = "ceiling", NODE, "forward", f"one of {_NODES}, n=1024", "float32"
    return Case(*labels, prepare, launches=("graph",))


def l2_case(device: str, cache: int) -> Case:
    """A quarter of L2 into another one, over and over: what L2 gives and takes, by a kernel.

    Args:
        device: where.
        cache: bytes of L2.
    """
    numel = cache // 4 // 4

    def prepare() -> Prepared:
        source = torch.randn(numel, device=device)
        target = torch.full_like(source, float("nan"))
        return Prepared(
            # Negated, as a plain copy need not be a kernel.
            [lambda: (torch.neg(source, out=target),)] * _COPIES,
            lambda outputs: 0.0 if torch.equal(outputs[0], -source) else float("nan"),
        )

    labels = "ceiling", L2, "forward", f"n={numel}, L2 of {cache / 2**20:g} MiB", "float32"
    return Case(*labels, prepare, bytes=2 * 4 * numel, launches=("graph",))


def _busy(context: Context, milliseconds: float) -> str:
    """`how_it_fares` while products are under way, of which each takes so long."""
    count = min(_MOST_PRODUCTS, int(_BUSY_SECONDS * 1e3 / max(milliseconds, 1e-3)))
    prepared = product_case(context.device, context.quick, PRODUCTS[-1]).prepare()
    # Queued: a GPU works through them by itself.
    for _ in range(count):
        prepared.runs[0]()
    note = how_it_fares(context.device)
    if context.device == "cuda":
        torch.cuda.synchronize()
    return note


def _tell(context: Context, mode: str, says: Callable[[], str], name: str = CARD) -> None:
    """A row of a note; whatever goes wrong is its note."""
    labels = {"op": "ceiling", "implementation": name, "mode": mode}
    if context.known(labels):
        return
    with context.running(labels):
        try:
            note = says()
        except Exception as reason:
            note = why(reason)
        context.recorder.write(**labels, note=note)


def how_it_fares(device: str) -> str:
    """Clocks, power, temperature and what holds them back, in a line; nothing is changed."""
    if device != "cuda":
        return "not measured: no GPU"
    card = torch.cuda.get_device_properties(0)
    try:
        values = _ask_driver(str(card.uuid))
    except (OSError, ValueError, subprocess.TimeoutExpired) as reason:
        most = f"SM {card.clock_rate / 1e3:.0f} MHz, memory {card.memory_clock_rate / 1e3:.0f} MHz"
        return f"nvidia-smi does not tell ({why(reason)}); by the driver at most {most}"
    sm, memory, power, celsius, held = values
    return f"SM {sm}, memory {memory}, {power}, {celsius} C, {_held_back(held)}"


def _ask_driver(uuid: str) -> list[str]:
    """What `_ASKED` names, and the bits of what holds the clocks back.

    Raises:
        OSError: without nvidia-smi.
        ValueError: where it gives no answer.
    """
    # By the card's own name, as the driver counts those that this process may not see.
    for reasons, only in itertools.product(_REASONS, ([f"--id=GPU-{uuid}"], [])):
        query = f"--query-gpu={','.join((*_ASKED, reasons))}"
        command = ["nvidia-smi", query, "--format=csv,noheader", *only]
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
        values = [text.strip() for text in run.stdout.partition("\n")[0].split(",")]
        if run.returncode == 0 and len(values) == len(_ASKED) + 1:
            return values
    raise ValueError(run.stdout or run.stderr or "no word")


def _held_back(bits: str) -> str:
    """What holds the clocks back, by the driver's bits; as it is, where they are none."""
    try:
        number = int(bits, 16)
    except ValueError:
        return f"held back by {bits}"
    names = [name for bit, name in _HELD_BACK.items() if number & bit]
    names += [hex(rest)] if (rest := number & ~sum(_HELD_BACK)) else []
    return f"held back by {', '.join(names) or 'nothing'}"


def compared(rows: Iterable[Mapping[str, str]]) -> list[list[str]]:
    """What was measured of a device, beside what `bench.kernel_model` takes it for.

    Args:
        rows: of one call, or of the ledger: the device of the last ceiling counts, and of each
            ceiling its latest row.

    Returns:
        For each number that was measured or guessed ``[what, measured, guessed, measured /
        guessed]``, "" where there is none; nothing without a ceiling.
    """
    # Late: it wants Triton.
    from bench.kernel_model import guesses_of

    ours = [row for row in rows if row["op"] == "ceiling"]
    ours = [row for row in ours if row["device"] == ours[-1]["device"]]
    measured = _measured(ours)
    if not measured:
        return []
    guesses = guesses_of(ours[-1]["device"])
    guessed: dict[str, float | None] = {}
    if guesses is not None:
        guessed = {name: getattr(guesses.sheet, name) for name in PRODUCTS}
        guessed |= {"copy": guesses.sheet.bandwidth, L2: guesses.l2, _L2_ALONE: guesses.l2}
        guessed |= {"clock": guesses.clock, NODE: guesses.launch}
    table = []
    for name, (what, unit, scale) in _COMPARED.items():
        pair = measured.get(name), guessed.get(name)
        texts = ["" if value is None else f"{value / scale:.4g} {unit}" for value in pair]
        if any(texts):
            ratio = f"{pair[0] / pair[1]:.2f}" if pair[0] and pair[1] else ""
            table.append([what, *texts, ratio])
    return table


def _measured(rows: Iterable[Mapping[str, str]]) -> dict[str, float]:
    """The numbers of `_COMPARED` in rows of one device, in bytes/s, FLOP/s, Hz and seconds."""
    found: dict[str, float] = {}
    copied = 0.0
    for row in rows:
        if (limit := ceiling(row)) is not None:
            found.update([limit])
        elif row["implementation"] == NODE and row["p50_ms"]:
            found[NODE] = float(row["p50_ms"]) / 1e3
        elif row["implementation"] == L2 and row["p50_ms"]:
            found[L2] = float(row["bytes_per_s"])
            copied = found[L2] * float(row["p50_ms"]) / 1e3
        elif (row["implementation"], row["mode"]) == (CARD, WITHIN):
            clock = re.match(r"SM (\d+) MHz", row["note"])
            found |= {"clock": 1e6 * int(clock[1])} if clock else {}
    left = copied / found[L2] - found.get(NODE, 0.0) if copied else 0.0
    # A small kernel's time is not all gap: a bound from above.
    return found | ({_L2_ALONE: copied / left} if left > 0 and NODE in found else {})
