"""DIR/README.md: what a run of the runbook found, for somebody who was not there.

It is made of the rows and the kernels' table alone, so that it can be written anywhere, and anew
(`--page`). Pictures want matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

from bench import ceilings
from bench.gpu import launch_check, smoke
from bench.gpu.kernel_profile import read_kernels
from bench.gpu.parts import PARTS
from bench.gpu.runner import PART
from bench.ledger import ceiling, read_rows
from bench.measure import HOLDS, LABELS
from bench.peers import FUSED, SAMPLING, TRITON, UNFUSED
from fastsfvae.ground.atomic import write_text

PAGE = "README.md"
Row = dict[str, str]
# Kernels of a table, and lines of what to do next.
LISTED, NEXT = 15, 8
# Operations that have a section of their own.
_TOLD = frozenset(
    {PART, smoke.OP, launch_check.OP, "decoder+loss", "training step"}
    | {"compile", "profile", "ceiling", "sweep", "tests", "training on digits"}
)

case_of = itemgetter(*LABELS)


def write(folder: Path, rows_name: str, *, rehearsal: bool = False) -> list[str]:
    """Write the page and its pictures.

    Args:
        folder: of a run.
        rows_name: of its file of rows.
        rehearsal: whether the sizes were tiny, so that no number means anything.

    Returns:
        What was left out, a line each.
    """
    rows = _of_one_run(read_rows(folder / rows_name))
    if not rows:
        write_text(folder / PAGE, "# Nothing was measured\n")
        return ["no rows"]
    limits = dict(filter(None, map(ceiling, rows)))
    kernels = [row | {"floor_us": _floor(row, limits)} for row in _of_one_run(read_kernels(folder))]
    pictures, left_out = _pictures(folder, rows, kernels, limits)
    last = rows[-1]
    lines = [f"# {last['device']}", ""]
    if rehearsal:
        lines += ["**A rehearsal: sizes are tiny, and no number below means anything.**", ""]
    lines += [
        f"fastsfvae {last['commit']}, torch {last['torch']}, Triton {last['triton']}, "
        f"{last['date']}. Times are medians. An error is relative, against float64. Made by "
        "`python -m bench.gpu --out DIR`.",
        *("", *_to_do(rows, kernels, limits)),
    ]
    for title, section in SECTIONS.items():
        found = section(rows, kernels, limits)
        if found:
            lines += ["", f"## {title}", "", *found]
    for name, says in pictures:
        lines += ["", f"![{says}]({name})"]
    lines += ["", "## What ran", "", *_parts(rows)]
    write_text(folder / PAGE, "\n".join(lines) + "\n")
    return left_out


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, or nothing without a body."""
    if not body:
        return []
    lines = [head, ["---"] * len(head), *body]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def _floor(row: Row, limits: dict[str, float]) -> str:
    """Microseconds of a kernel's bytes and FLOPs at the measured ceilings, where both are known."""
    pairs = (row["bytes"], limits.get("copy")), (row["flops"], limits.get(row["dtype"]))
    seconds = [float(amount) / limit for amount, limit in pairs if amount and limit]
    return f"{1e6 * max(seconds):.3f}" if seconds else ""


def _of_one_run(rows: Sequence[Row]) -> list[Row]:
    """The last of each case, of the last row's device, software and commit."""
    if not rows:
        return []
    held = [name for name in HOLDS if name in rows[-1]]
    own = itemgetter(*held)
    names = [name for name in rows[-1] if name in (*LABELS, "step", "launch", "kernel")]
    key = itemgetter(*names)
    return [*{key(row): row for row in rows if own(row) == own(rows[-1])}.values()]


def failures(rows: Sequence[Row]) -> list[Row]:
    """Cases that went wrong, and parts that ended."""
    says = ("failed", "not timed", "ended", smoke.WRONG)
    return [row for row in rows if row["note"].startswith(says)]


def _to_do(rows: list[Row], kernels: list[Row], limits: dict[str, float]) -> list[str]:
    """What to do next: what is wrong first, then the largest loss."""
    lines = ["## What to do next", ""]
    wrong = [
        row for row in rows if row["op"] in (smoke.OP, launch_check.OP) and row in failures(rows)
    ]
    lines += [
        f"- **{row['op']}, {row['implementation']}, {row['mode']}, {row['dtype']}**: {row['note']}"
        for row in wrong[:NEXT]
    ]
    for row in _losses(kernels)[:NEXT]:
        lost = float(row["us"]) - float(row["floor_us"])
        lines.append(
            f"- {row['kernel']} ({row['dtype']}): {float(row['us']):.1f} us where its floor is "
            f"{float(row['floor_us']):.1f}: {lost:.1f} us of every step"
        )
    lines += [
        f"- the library's product is {ratio:.2f} times as fast as the fused kernel: {name}"
        for name, ratio in _lost_layers(rows)[:NEXT]
    ]
    return lines if len(lines) > 2 else [*lines, "Nothing that these rows tell."]


def _losses(kernels: list[Row]) -> list[Row]:
    """Kernels of this library's captured loss, the largest loss against its floor first."""
    own = [
        row
        for row in kernels
        if row["us"] and row["floor_us"] and row["implementation"] == TRITON
        if row["launch"] == _best_launch(kernels)
        if row["step"] == "loss"
        if float(row["us"]) > float(row["floor_us"])
    ]
    return sorted(own, key=lambda row: float(row["floor_us"]) - float(row["us"]))


def _best_launch(kernels: list[Row]) -> str:
    return "graph" if any(row["launch"] == "graph" for row in kernels) else "eager"


def _lost_layers(rows: list[Row]) -> list[tuple[str, float]]:
    """Layers that the library computes faster, by how much."""
    found = []
    for _, times in _sides(rows).items():
        best = min((t for name, t in times.items() if name.startswith("fused")), default=None)
        others = [t for name, t in times.items() if not name.startswith("fused")]
        if best is not None and others and min(others) < best:
            found.append((_, best / min(others)))
    return sorted(found, key=lambda pair: -pair[1])


def _sides(rows: list[Row]) -> dict[str, dict[str, float]]:
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
    for op in ("decoder+loss", "training step"):
        names = {TRITON, FUSED, UNFUSED, SAMPLING}
        body = [
            [
                *(row["shape"], row["implementation"], row["mode"], row["dtype"], row["p50_ms"]),
                *(row["ratio"], row["share_of_ceiling"], row["peak_mib"], row["error"]),
            ]
            for row in rows
            if row["op"] == op and row["implementation"] in names and row["p50_ms"]
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
    mine = (TRITON, FUSED, UNFUSED)
    for row in rows:
        if row["op"] in ("decoder+loss", "training step") and row["p50_ms"]:
            if row["implementation"] in mine:
                ms = float(row["p50_ms"])
                ours[place(row)] = min(ms, ours.get(place(row), ms))
    body = []
    for row in rows:
        if place(row) not in ours or row["implementation"] in (*mine, SAMPLING):
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
    found = _sides(rows)
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
        [*case_of(row), row["p50_ms"], row["share_of_ceiling"], row["error"]]
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
    return table((*LABELS, "why"), [[*case_of(row), row["note"]] for row in failures(rows)])


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


def _parts(rows: list[Row]) -> list[str]:
    notes = {row["implementation"]: row["note"] for row in rows if row["op"] == PART}
    body = [[name, part.says, notes.get(name, "")] for name, part in PARTS.items()]
    return table(("part", "what it asks", "how it went"), body)


def _pictures(
    folder: Path, rows: list[Row], kernels: list[Row], limits: dict[str, float]
) -> tuple[list[tuple[str, str]], list[str]]:
    try:
        from bench.gpu.pictures import draw
    except ImportError:
        return [], ["no pictures: matplotlib is not installed; give --page where it is"]
    return draw(folder, rows, _largest(kernels), limits)


def _largest(kernels: list[Row]) -> list[Row]:
    """Kernels of the step that the pictures show, the largest first."""
    own = [row for row in kernels if row["implementation"] == TRITON and row["step"] == "loss"]
    own = [row for row in own if row["launch"] == _best_launch(own) and row["us"]]
    own = [row for row in own if row["dtype"] == own[0]["dtype"]]
    return sorted(own, key=lambda row: -float(row["us"]))
