"""The page's pictures: a step's kernels beside their floors, their roofline, and the peers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.report import LINE_COLOUR, OURS_COLOUR, PEER_COLOUR, plot_peers, save

Row = dict[str, str]
# Bars of a step, and points of the roofline with a number beside them.
LISTED = 18


def draw(
    folder: Path, rows: list[Row], kernels: Sequence[Row], limits: dict[str, float]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Draw what the rows have.

    Args:
        folder: where pictures go.
        rows: of a run.
        kernels: of one step, the largest first.
        limits: measured ceilings: "copy" in bytes a second, FLOPs by dtype.

    Returns:
        (name, what it shows) of each picture; and a line for each that was left out.
    """
    drawn, left_out = [], []
    timed = [row for row in rows if row["p50_ms"]]
    pictures = {
        "kernels.png": ("A step's kernels beside their floors", partial(_bars, kernels)),
        "roofline.png": ("The same under what the card can do", partial(_roof, kernels, limits)),
        "peers.png": ("This library and everybody else", partial(plot_peers, timed)),
    }
    for name, (says, picture) in pictures.items():
        try:
            picture(folder / name)
        except ValueError as reason:
            left_out.append(f"{name}: not drawn: {reason}")
        else:
            drawn.append((name, says))
    return drawn, left_out


def _bars(kernels: Sequence[Row], path: Path) -> None:
    shown = [row for row in kernels if row["us"]][:LISTED][::-1]
    if not shown:
        raise ValueError("no kernel has a time: run the profile and the ceilings")
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.32 * len(shown)))
    names = [f"{_label(row)}  {len(shown) - at}" for at, row in enumerate(shown)]
    places = range(len(shown))
    axis.barh(places, [float(row["us"]) for row in shown], color=OURS_COLOUR)
    axis.set_yticks(places, names, fontsize=7)
    floors = [(at, float(row["floor_us"])) for at, row in enumerate(shown) if row["floor_us"]]
    if floors:
        at, floor = zip(*floors, strict=True)
        axis.scatter(floor, at, marker="|", s=120, color=LINE_COLOUR, label="floor", zorder=3)
        axis.legend(loc="lower right", fontsize=8)
    axis.set_xlabel("microseconds of a step")
    axis.set_title(_title(shown[0]), loc="left", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _roof(kernels: Sequence[Row], limits: dict[str, float], path: Path) -> None:
    # By their numbers in the other picture.
    numbered = enumerate((row for row in kernels if row["us"]), 1)
    points = [of for of in numbered if of[1]["gb_per_s"] and of[1]["tflop_per_s"] not in ("", "0")]
    points = [(number, row) for number, row in points if number <= LISTED]
    rates = {name: rate for name, rate in limits.items() if name in ("float32", "tf32", "bfloat16")}
    if "copy" not in limits or not rates or not points:
        raise ValueError("wants ceilings, and kernels with bytes and FLOPs")
    figure, axis = plt.subplots(figsize=(9, 5.5))
    for name, rate in rates.items():
        corners = [1 / 8, rate / limits["copy"], 4096]
        roof = [min(rate, x * limits["copy"]) / 1e12 for x in corners]
        axis.plot(corners, roof, label=name, color=PEER_COLOUR if len(rates) == 1 else None)
    for number, row in points:
        y = float(row["tflop_per_s"])
        x = 1e3 * y / float(row["gb_per_s"])
        axis.plot(x, y, "o", color=OURS_COLOUR)
        axis.annotate(str(number), (x, y), (5, 3), textcoords="offset points", fontsize=8)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s")
    axis.set_title(_title(points[0][1]), loc="left", fontsize=9)
    axis.legend(title="measured ceilings", loc="upper left", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    key = "\n".join(f"{number}  {_label(row)}" for number, row in points)
    figure.text(0.01, -0.02, key, fontsize=6.5, va="top")
    save(figure, path)


def _label(row: Row) -> str:
    label = row["kernel"].removeprefix("_").replace("_kernel", "")
    return label if len(label) <= 80 else f"{label[:77]}..."


def _title(row: Row) -> str:
    of_step = (row[name] for name in ("step", "implementation", "dtype", "launch"))
    return f"{row['device']}: {', '.join(of_step)}"
