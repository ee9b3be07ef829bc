"""The page's sections: rows as tables, by the question that they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter

from bench import ceilings
from bench.gpu import launch_check, smoke
from bench.gpu.parts import PARTS
from bench.gpu.runner import PART
from bench.measure import LABELS
from bench.peers import FUSED, SAMPLING, TRITON, UNFUSED

Row = dict[str, str]
# This library on its kernels, and what is compared with it.
OWN = TRITON, FUSED, UNFUSED
COMPARED = "decoder+loss", "training step"
# Kernels of a table.
LISTED = 15
# Operations that have a section of their own.
_TOLD = frozenset(
    {PART, smoke.OP, launch_check.OP, *COMPARED}
    | {"compile", "profile", "ceiling", "sweep", "tests", "training on digits"}
)

_case_of = itemgetter(*LABELS)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, or nothing without a body."""
    if not body:
        return []
    lines = [head, ["---"] * len(head), *body]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def failures(rows: Sequence[Row]) -> list[Row]:
    """Cases that went wrong, and parts that ended."""
    says = ("failed", "not timed", "ended", smoke.WRONG)
    return [row for row in rows if row["note"].startswith(says)]


def sides(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Milliseconds of each layer's case by implementation."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if "layer" in row["op"] or row["op"].startswith("tangent_conv"):
            name = f"{row['op']}, {row['shape']}, {row['dtype']}, {row['mode']}"
            if row["p50_ms"]:
                found.setdefault(name, {})[row["implementation"]] = float(row["p50_ms"])
    return found


def _right(rows: list[Row], *_: object) -> list[str]:
    body = [
        [row["implementation"], row["mode"], row["dtype"], row["error"], row["note"]]
        for row in rows
        if row["op"] in (smoke.OP, launch_check.OP)
    ]
    if not body:
        return []
    text = next(row["shape"] for row in rows if row["op"] == smoke.OP) if body else ""
    return [
        f'Loss and every gradient, every sample, {text}. "fused" has every layer on the fused '
        'kernels, "library" none, the third what is chosen.',
        "",
        *table(("implementation", "launched", "products", "largest error", "what was found"), body),
    ]


def _fast(rows: list[Row], *_: object) -> list[str]:
    lines: list[str] = []
    for op in COMPARED:
        body = [
            [
                *(row["shape"], row["implementation"], row["mode"], row["dtype"], row["p50_ms"]),
                *(row["ratio"], row["share_of_ceiling"], row["peak_mib"], row["error"]),
            ]
            for row in rows
            if row["op"] == op and row["implementation"] in (*OWN, SAMPLING) and row["p50_ms"]
        ]
        head = ("workload", "implementation", "mode", "products", "ms", "to sampling")
        head += ("share of ceiling", "peak MiB", "error")
        if body:
            lines += ["", f"**{op}**", "", *table(head, body)]
    return lines[1:]


def _others(rows: list[Row], *_: object) -> list[str]:
    """Each peer beside this library's fastest of the same workload and products."""
    ours: dict[tuple[str, ...], float] = {}
    place = itemgetter("op", "shape", "dtype")
    for row in rows:
        if row["op"] in COMPARED and row["p50_ms"]:
            if row["implementation"] in OWN:
                ms = float(row["p50_ms"])
                ours[place(row)] = min(ms, ours.get(place(row), ms))
    body = []
    for row in rows:
        if place(row) not in ours or row["implementation"] in (*OWN, SAMPLING):
            continue
        ratio = f"{float(row['p50_ms']) / ours[place(row)]:.1f}x" if row["p50_ms"] else ""
        cells = [row["op"], row["shape"], row["dtype"], row["implementation"], row["p50_ms"]]
        body.append([*cells, ratio, row["peak_mib"], row["note"]])
    head = ("op", "workload", "products", "implementation", "ms", "this library's fastest is")
    return table((*head, "peak MiB", "note"), body)


def _kernels(rows: list[Row], kernels: list[Row], *_: object) -> list[str]:
    steps = [
        [row[name] for name in ("implementation", "shape", "mode", "dtype", "note")]
        for row in rows
        if row["op"] == "profile"
    ]
    head = ("implementation", "workload", "step", "products", "kernels")
    lines = table(head, steps)
    which = itemgetter("step", "implementation", "dtype", "launch")
    for step in dict.fromkeys(map(which, kernels)):
        of_step = [row for row in kernels if which(row) == step and row["us"]]
        of_step.sort(key=lambda row: -float(row["us"]))
        lines += ["", f"**{', '.join(step)}**", "", *kernel_table(of_step[:LISTED])]
        if rest := of_step[LISTED:]:
            us = sum(float(row["us"]) for row in rest)
            lines += ["", f"and {len(rest)} more, {us:.1f} us together"]
    return lines


def kernel_table(kernels: Sequence[Row]) -> list[str]:
    """Kernels of a step as a table."""
    names = ("kernel", "launches", "us", "floor_us", "share", "gb_per_s", "tflop_per_s")
    names += ("registers", "shared")
    head = ("kernel", "launches", "us", "floor, us", "share", "GB/s", "TFLOP/s", "registers")
    return table(
        (*head, "shared"), [[_short(row.get(name, "")) for name in names] for row in kernels]
    )


def _short(cell: str) -> str:
    return cell if len(cell) <= 90 else f"{cell[:87]}..."


def _layers(rows: list[Row], *_: object) -> list[str]:
    found = sides(rows)
    names = dict.fromkeys(name for times in found.values() for name in times)
    body = []
    for case, times in found.items():
        fastest = min(times, key=times.__getitem__)
        cells = [f"{times[name]:.4g}" if name in times else "" for name in names]
        body.append([case, *cells, fastest])
    return table(("layer, ms", *names, "fastest"), body)


def _ceilings(rows: list[Row], *_: object) -> list[str]:
    head = ("what", "measured", "what the model takes", "measured of that")
    notes = [
        f"- {row['implementation']} {row['mode']}: {row['note']}"
        for row in rows
        if row["op"] == "ceiling" and row["note"]
    ]
    return [*table(head, ceilings.compared(rows)), *([""] if notes else []), *notes]


def _sweep(rows: list[Row], *_: object) -> list[str]:
    body = [
        [row["implementation"], row["mode"], row["shape"], row["dtype"], row["p50_ms"], row["note"]]
        for row in rows
        if row["op"] == "sweep"
    ]
    return table(("kernel", "mode", "launch", "products", "ms", "tile"), body)


def _operations(rows: list[Row], *_: object) -> list[str]:
    body = [
        [*_case_of(row), row["p50_ms"], row["share_of_ceiling"], row["error"]]
        for row in rows
        if row["op"] not in _TOLD and row["p50_ms"]
        if "layer" not in row["op"] and not row["op"].startswith("tangent_conv")
    ]
    head = ("operation", "implementation", "mode", "shape", "products", "ms")
    return table((*head, "share of ceiling", "error"), body)


def _curves(rows: list[Row], *_: object) -> list[str]:
    body = [
        [row["implementation"], row["error"], row["note"]]
        for row in rows
        if row["op"] == "training on digits"
    ]
    return table(("implementation", "distance of the curves", "what was found"), body)


def _tests(rows: list[Row], *_: object) -> list[str]:
    body = [
        [row["implementation"], row["shape"], row["note"]] for row in rows if row["op"] == "tests"
    ]
    return table(("suite", "test", "what was found"), body)


def _failed(rows: list[Row], *_: object) -> list[str]:
    return table((*LABELS, "why"), [[*_case_of(row), row["note"]] for row in failures(rows)])


SECTIONS: dict[str, Callable[..., list[str]]] = {
    "Is it right?": _right,
    "How fast is it?": _fast,
    "Where does the time go?": _kernels,
    "What can the card do?": _ceilings,
    "Layers, fused and by the library": _layers,
    "Tiles that were tried": _sweep,
    "Everybody else": _others,
    "Single operations": _operations,
    "Training curves": _curves,
    "The kernels' own tests": _tests,
    "What failed": _failed,
}


def parts(rows: list[Row]) -> list[str]:
    notes = {row["implementation"]: row["note"] for row in rows if row["op"] == PART}
    body = [[name, part.says, notes.get(name, "")] for name, part in PARTS.items()]
    return table(("part", "what it asks", "how it went"), body)
