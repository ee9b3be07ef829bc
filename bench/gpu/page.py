"""DIR/README.md: what a run of the runbook found, for somebody who was not there.

It is made of the rows and the kernels' table alone, so that it can be written anywhere, and anew
(`--page`). Pictures want matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

from bench.gpu import launch_check, smoke
from bench.gpu.kernel_profile import read_kernels
from bench.gpu.sections import COMPARED, OWN, SECTIONS, failures, parts, sides
from bench.ledger import ceiling, read_rows
from bench.measure import HOLDS, LABELS
from bench.peers import TRITON
from fastsfvae.ground.atomic import write_text

PAGE = "README.md"
Row = dict[str, str]
# Lines of each kind in what to do next.
NEXT = 8


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
        *("", *_in_short(rows), "", *_to_do(rows, kernels, limits)),
    ]
    for title, section in SECTIONS.items():
        found = section(rows, kernels, limits)
        if found:
            lines += ["", f"## {title}", "", *found]
    for name, says in pictures:
        lines += ["", f"![{says}]({name})"]
    lines += ["", "## What ran", "", *parts(rows)]
    write_text(folder / PAGE, "\n".join(lines) + "\n")
    return left_out


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


def _in_short(rows: list[Row]) -> list[str]:
    """What most readers ask first: is it right, and how does it compare?"""
    lines = []
    checked = [row for row in rows if row["op"] == smoke.OP]
    if checked:
        wrong = sum(map(smoke.is_failure, checked))
        lines.append(f"- {len(checked)} cases of loss and gradients at full size, {wrong} wrong")
    compared: dict[tuple[str, ...], dict[bool, Row]] = {}
    for row in rows:
        if row["op"] in COMPARED and row["p50_ms"]:
            of = compared.setdefault((row["op"], row["shape"], row["dtype"]), {})
            mine = row["implementation"] in OWN
            best = of.get(mine)
            if best is None or float(row["p50_ms"]) < float(best["p50_ms"]):
                of[mine] = row
    for (op, shape, dtype), of in compared.items():
        if len(of) == 2:
            ours, other = of[True], of[False]
            ratio = float(other["p50_ms"]) / float(ours["p50_ms"])
            lines.append(
                f"- {op}, {shape}, {dtype}: {_timed(ours)} here; next best {_timed(other)}, "
                f"{ratio:.2f} times as long"
            )
    return ["## In short", "", *(lines or ["Nothing to compare yet."])]


def _timed(row: Row) -> str:
    return f"{float(row['p50_ms']):.4g} ms ({row['implementation']}, {row['mode']})"


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
    for case, times in sides(rows).items():
        best = min((t for name, t in times.items() if name.startswith("fused")), default=None)
        others = [t for name, t in times.items() if not name.startswith("fused")]
        if best is not None and others and min(others) < best:
            found.append((case, best / min(others)))
    return sorted(found, key=lambda pair: -pair[1])


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
