"""Tables and plots of the ledger: `python -m bench.report` writes bench/results/.

    report.md       the latest row of everything, by operation and shape, failures with their reason
    peers.png       times of the log-density, of decoder and loss, and of a step, against the peers'
    roofline.png    rates against the ceilings that were measured in the same run
    scaling.png     time against m, B and image size, with the slope of a fit in logarithms

Rows of one device, thread count and software version are never mixed with others'.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.command import make_parser
from bench.ledger import LEDGER, RESULTS, ceiling, read_rows
from bench.problems import WORKLOADS

Row = dict[str, str]
OURS_COLOUR, PEER_COLOUR, LINE_COLOUR = "#1b6ca8", "#b8bec4", "#c44536"
_OPERATIONS_IN_WORDS = {
    "low_rank_log_prob": "log-density, J given",
    "decoder+loss": "decoder and loss",
    "training step": "training step",
}
OPERATIONS = tuple(_OPERATIONS_IN_WORDS)
_MODES_IN_WORDS = {"forward": ", value", "both": ", value and gradient", "step": ""}
_MODELS_IN_WORDS = {"conv": "convolutional", "mlp": "fully connected", "tanh": "tanh network"}
machine = itemgetter("device", "threads", "torch", "triton")


def on_machine(rows: list[Row], chosen: str | None) -> list[Row]:
    """The rows of one machine: the one named, or that of the latest row with a time.

    Raises:
        ValueError: where there is no such row.
    """
    timed = [row for row in rows if row["p50_ms"] and (chosen is None or chosen in row["device"])]
    if not timed:
        raise ValueError(f"no timed row of {chosen or 'any device'!r}: run `make bench` first")
    wanted = machine(timed[-1])
    return [row for row in rows if machine(row) == wanted]


def latest(rows: list[Row]) -> list[Row]:
    """The last row of each case, with a peak memory that an earlier one has."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = itemgetter("op", "implementation", "mode", "shape", "dtype")(row)
        before = found.pop(key, row)
        if row["peak_mib"] and not row["p50_ms"]:
            # Memory alone, by a run of its own.
            found[key] = before | {"peak_mib": row["peak_mib"]}
        else:
            found[key] = row | {"peak_mib": row["peak_mib"] or before["peak_mib"]}
    return list(found.values())


def groups(rows: list[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows that compute the same thing, fastest first, what has no time last."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(itemgetter("op", "mode", "shape", "dtype")(row), []).append(row)
    slowest = float("inf")
    for group in found.values():
        group.sort(key=lambda row: float(row["p50_ms"] or slowest))
    return found


def is_ours(row: Row) -> bool:
    return row["implementation"].startswith("fastsfvae")


def markdown(rows: list[Row]) -> str:
    """All groups as tables."""
    lines = ["# Measured", "", f"{_machine_text(rows[-1])}. Medians and the range from the 20th"]
    lines[-1] += " to the 80th percentile; the ratio is a median of paired rounds."
    for key, group in groups(latest(rows)).items():
        lines += ["", f"## {' · '.join(part for part in key if part)}", ""]
        lines += ["| implementation | ms | ratio | share of ceiling | error | peak MiB | note |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in group:
            time = row["p50_ms"] and f"{row['p50_ms']} ({row['p20_ms']} to {row['p80_ms']})"
            ratio = row["ratio"] and f"{row['ratio']} x {row['ratio_to']}"
            cells = [row["implementation"], time, ratio, row["share_of_ceiling"], row["error"]]
            lines.append(f"| {' | '.join([*cells, row['peak_mib'], row['note']])} |")
    return "\n".join(lines) + "\n"


def in_words(operation: str, mode: str, shape: str, dtype: str) -> str:
    """A group's key for readers who do not know the names of the workloads."""
    said = _OPERATIONS_IN_WORDS[operation] + _MODES_IN_WORDS.get(mode, mode and f", {mode}")
    name, *rest = shape.split()
    if name in WORKLOADS:
        workload = WORKLOADS[name]
        channels, height, width = workload.image_shape
        kind = f"{height}x{width} {'colour images' if channels == 3 else 'digits'}"
        network = _MODELS_IN_WORDS.get(workload.model, workload.model)
        said += f": {network}, {kind}"
        if workload.output_activation != "none":
            said += f", {workload.output_activation} output"
    else:
        rest = [name, *rest]
    sizes = dict(text.split("=") for text in rest if "=" in text)
    words = [sizes.get("m") and f"m = {sizes['m']}", sizes.get("B") and f"batch of {sizes['B']}"]
    if name not in WORKLOADS and "n" in sizes:
        words.append(f"{int(sizes['n']):,} outputs")
    # A layout that all rows have says nothing.
    words += [text for text in rest if "=" not in text and text != "channels-last"]
    return ", ".join([said, *filter(None, words), dtype])


def plot_peers(rows: list[Row], path: Path) -> None:
    """Bars of each group that has this library's time and another's."""
    chosen = [
        (key, [row for row in group if row["p50_ms"]])
        for key, group in groups(latest(rows)).items()
        if key[0] in OPERATIONS
    ]
    chosen = [
        (key, group)
        for key, group in chosen
        if any(map(is_ours, group)) and not all(map(is_ours, group))
    ]
    if not chosen:
        raise ValueError("no operation has a time of this library and of a peer")
    heights = [len(group) + 1.6 for _, group in chosen]
    figure, axes = plt.subplots(
        *(len(chosen), 1), figsize=(8, 0.3 * sum(heights)), squeeze=False, height_ratios=heights
    )
    for axis, (key, group) in zip(axes[:, 0], chosen, strict=True):
        names = [row["implementation"] for row in group][::-1]
        p50, p20, p80 = (
            [float(row[name]) for row in group][::-1] for name in ("p50_ms", "p20_ms", "p80_ms")
        )
        spread = [[m - a for m, a in zip(p50, p20, strict=True)]]
        spread += [[b - m for m, b in zip(p50, p80, strict=True)]]
        colours = [OURS_COLOUR if is_ours(row) else PEER_COLOUR for row in group][::-1]
        axis.barh(names, p50, xerr=spread, color=colours, ecolor="#444444", capsize=2)
        for place, row in enumerate(reversed(group)):
            # Paired, so that it holds where bars of different runs are drawn together.
            text = f"{p50[place]:,.{0 if p50[place] >= 100 else 1}f}"
            text += f" ({row['ratio']}x)" if row["ratio"] else ""
            spot = (p80[place], place)
            axis.annotate(text, spot, (4, 0), textcoords="offset points", va="center")
        axis.set_xlim(0, 1.25 * max(p80))
        axis.set_title(in_words(*key), loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    label = "milliseconds; in brackets paired ratios to this library, those of a step to sampling"
    figure.supxlabel(f"{label}\n{_machine_text(rows[-1])}", fontsize=9)
    save(figure, path)


def plot_roofline(rows: list[Row], path: Path) -> None:
    """What each operation reaches, against the copy's and the products' rates."""
    ceilings = dict(filter(None, map(ceiling, latest(rows))))
    if not {"copy", "float32"} <= ceilings.keys():
        raise ValueError("no ceilings of this machine: run `make bench`")
    bandwidth = ceilings["copy"]
    figure, axis = plt.subplots(figsize=(8, 5))
    key: list[str] = []
    for name in sorted(ceilings.keys() - {"copy"}):
        peak = ceilings[name]
        corners = [1 / 8, peak / bandwidth, 4096]
        axis.plot(corners, [min(peak, i * bandwidth) / 1e9 for i in corners], label=name)
    for row in latest(rows):
        if row["op"] == "ceiling" or not (row["bytes_per_s"] and row["flop_per_s"]):
            continue
        x = float(row["flop_per_s"]) / float(row["bytes_per_s"])
        colour = OURS_COLOUR if is_ours(row) else PEER_COLOUR
        axis.plot(x, float(row["flop_per_s"]) / 1e9, "o", color=colour)
        if is_ours(row):
            # Labels beside the points would cover one another.
            key.append(f"{len(key) + 1}  {row['op']} {row['mode']}, {row['shape']} {row['dtype']}")
            place = (x, float(row["flop_per_s"]) / 1e9)
            axis.annotate(str(len(key)), place, (5, 3), textcoords="offset points", fontsize=8)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s")
    axis.set_title(f"{_machine_text(rows[-1])}: blue this library, grey peers", fontsize=9)
    axis.legend(title="measured ceilings")
    corner = {"ha": "right", "va": "bottom", "multialignment": "left"}
    axis.text(1, 0, "\n".join(key), transform=axis.transAxes, fontsize=7, **corner)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def size_of(row: Row) -> dict[str, int]:
    """B, n and m of a row's shape."""
    pairs = (text.partition("=") for text in row["shape"].split())
    return {name: int(value) for name, _, value in pairs if value.isdigit()}


def slope(points: list[tuple[float, float]]) -> float:
    """The exponent of a power law, by least squares in logarithms."""
    xs, ys = ([math.log(p[i]) for p in points] for i in (0, 1))
    mx, my = (sum(v) / len(v) for v in (xs, ys))
    above = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - mx) ** 2 for x in xs)


def scalings(rows: list[Row]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{"m" | "B" | "n": {what is held: [(size, ms)]}} where several sizes were measured."""
    found: dict[str, dict[str, dict[float, float]]] = {"m": {}, "B": {}, "n": {}}
    for row in latest(rows):
        size = size_of(row)
        if row["op"] != "decoder+loss" or not row["p50_ms"] or size.keys() != {"B", "n", "m"}:
            continue
        for name, series in found.items():
            held = " ".join(f"{k}={v}" for k, v in size.items() if k != name)
            model = "conv" if row["shape"].startswith("celeba") else "mlp"
            label = f"{row['implementation']} {model} {held} {row['dtype']}"
            series.setdefault(label, {})[size[name]] = float(row["p50_ms"])
    return {
        name: {label: sorted(p.items()) for label, p in series.items() if len(p) >= 2}
        for name, series in found.items()
    }


def plot_scaling(rows: list[Row], path: Path) -> None:
    """Time of decoder and loss against each size."""
    found = {name: series for name, series in scalings(rows).items() if series}
    if not found:
        raise ValueError(
            "no two sizes of m, B or n: run `python -m bench.claims latents batch images`"
        )
    figure, axes = plt.subplots(1, len(found), figsize=(5 * len(found), 4), squeeze=False)
    for axis, (name, series) in zip(axes[0], found.items(), strict=True):
        for label, points in series.items():
            xs, ys = zip(*points, strict=True)
            axis.plot(xs, ys, "o-", label=f"{label}: slope {slope(points):.2f}")
        axis.set(xscale="log", yscale="log", xlabel=name, ylabel="milliseconds")
        axis.legend(fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"decoder and loss, both ways\n{_machine_text(rows[-1])}", fontsize=9)
    save(figure, path)


def _machine_text(row: Row) -> str:
    threads = f", {row['threads']} threads" if row["threads"] else ""
    return f"{row['device']}{threads}, torch {row['torch']}"


def save(figure, path: Path) -> None:
    """Write a figure, with what lies beside its axes, and close it."""
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


PLOTS: dict[str, Callable[[list[Row], Path], None]] = {
    "peers.png": plot_peers,
    "roofline.png": plot_roofline,
    "scaling.png": plot_scaling,
}


def main() -> None:
    """Write the report; a plot whose rows are missing says what to run."""
    parser = make_parser("report", __doc__)
    parser.add_argument("--ledger", type=Path, default=LEDGER)
    parser.add_argument("--device", help="part of a device's name; default: the last row's")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    try:
        rows = on_machine(read_rows(options.ledger), options.device)
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.md").write_text(markdown(rows))
    for name, plot in PLOTS.items():
        try:
            plot(rows, options.out / name)
        except ValueError as reason:
            print(f"{name}: not drawn: {reason}")
    print(f"{len(rows)} rows of {_machine_text(rows[-1])}: {options.out / 'report.md'}")


if __name__ == "__main__":
    main()
