"""What to expect of a card, from counts alone: `python -m bench.model --card "RTX 4090"`.

Prints the FLOPs, bytes and least time of decoder and loss, forward and backward, on the cards of
fastsfvae/jacobian/cost.py, by data sheet; then, where the ledger has rows of this workload, how far
the measured ones are from the same model fed with the ceilings that were measured beside them; and
the paper's full CelebA run, projected from measured training steps.

With --kernels, in their place: the time of each of this library's kernels on a card, from their
machine code and the card's data sheet, as `bench.kernel_model` computes it; a minute a card.
"""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path

import torch

import fastsfvae as sf
from bench.command import make_parser
from bench.kernel_model import DTYPES as KERNEL_DTYPES
from bench.kernel_model import GUESSES, MODELLED, lines_of
from bench.ledger import LEDGER, ceiling, read_rows
from bench.problems import WORKLOADS, build_problem
from fastsfvae.jacobian.cost import CARDS, Card, step_floor

DTYPES = ("float32", "tf32", "bfloat16")
# The paper's CelebA run: 10^6 steps of B = 64 with m = 16, 14.5 hours on its Quadro RTX 6000.
PAPER_STEPS, PAPER_HOURS, PAPER_WORKLOAD, PAPER_BATCH = 10**6, 14.5, "celeba16", 64

_run = itemgetter("device", "threads", "torch", "triton", "commit", "date")


def report_of(workload: str) -> sf.DecoderReport:
    """The static counts of a workload's decoder."""
    problem = build_problem(workload, 2)
    return sf.check_decoder(problem.decoder, problem.mean.detach())


def floors(report: sf.DecoderReport, cards: list[str], batch: int) -> list[str]:
    """A line for each card and dtype that it has."""
    lines = [f"{'card':18s} {'products':9s} {'GFLOP':>8s} {'MB':>8s} {'ms, at least':>13s}"]
    for name in cards:
        for dtype in DTYPES:
            if getattr(CARDS[name], dtype) is None:
                continue
            flops, moved, seconds = report.floor(name, batch, dtype)
            lines.append(
                f"{name:18s} {dtype:9s} {flops / 1e9:8.1f} {moved / 1e6:8.0f} {1e3 * seconds:13.3f}"
            )
    return lines


def measured_cards(rows: list[dict[str, str]]) -> dict[tuple[str, ...], Card]:
    """Measured ceilings as cards, by device, threads, versions and commit."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if (limit := ceiling(row)) is not None:
            found.setdefault(_run(row), {}).update([limit])
    return {
        key: Card(name=key[0], bandwidth=rates.pop("copy"), **rates)
        for key, rates in found.items()
        if rates.keys() >= {"copy", "float32"}
    }


def compared(report: sf.DecoderReport, workload: str, rows: list[dict[str, str]]) -> list[str]:
    """Measured times of decoder and loss beside the floor of their own run's ceilings."""
    cards, lines = measured_cards(rows), []
    for row in rows:
        name, _, sizes = row["shape"].partition(" ")
        card = cards.get(_run(row))
        if (row["op"], name) != ("decoder+loss", workload) or not row["p50_ms"] or card is None:
            continue
        if not row["implementation"].startswith("fastsfvae") or getattr(card, row["dtype"]) is None:
            continue
        size = dict(text.split("=") for text in sizes.split() if "=" in text)
        if int(size["m"]) != report.latent_dim:
            continue
        n = int(size["n"])
        floor = step_floor(report.layers, report.latent_dim, n, int(size["B"]), card, row["dtype"])
        ms = float(row["p50_ms"])
        lines.append(
            f"{row['device']}, {row['threads']} threads, {row['commit']}, {row['implementation']}, "
            f"B={size['B']}, {row['dtype']}: {ms:.2f} ms, at least {1e3 * floor.seconds:.2f} ms "
            f"({1e3 * floor.seconds / ms:.0%})"
        )
    return lines


def projected(rows: list[dict[str, str]]) -> list[str]:
    """The paper's run in hours, from every measured training step of its size."""
    size = f"{PAPER_WORKLOAD} B={PAPER_BATCH} "
    return [
        f"{row['device']}, {row['threads']} threads, {row['implementation']}, {row['mode']}, "
        f"{row['dtype']}: {float(row['p50_ms']) / 3.6e6 * PAPER_STEPS:.1f} hours"
        for row in rows
        if row["op"] == "training step" and row["shape"].startswith(size) and row["p50_ms"]
    ]


def main() -> None:
    """Print all three, or the kernels' times."""
    parser = make_parser("model", __doc__)
    parser.add_argument("--card", choices=CARDS, action="append", help="default: all")
    parser.add_argument("--workload", choices=WORKLOADS, default=PAPER_WORKLOAD)
    parser.add_argument("--batch", type=int, help="default: the workload's own")
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="the measured rows")
    parser.add_argument("--kernels", action="store_true", help="the time of each kernel instead")
    options = parser.parse_args()
    unknown = set(options.card or ()) - set(MODELLED)
    if options.kernels and unknown:
        parser.error(f"--kernels knows {', '.join(MODELLED)}, not {', '.join(sorted(unknown))}")
    batch = options.batch or WORKLOADS[options.workload].batch
    torch.set_num_threads(1)
    report = report_of(options.workload)
    if options.kernels:
        print(f"{options.workload}, B = {batch}: decoder and loss, forward and backward, modelled")
        print(GUESSES)
        for card in options.card or MODELLED:
            for dtype in KERNEL_DTYPES:
                floor = report.floor(card, batch, dtype)[2]
                lines = lines_of(options.workload, card, dtype, batch, floor)
                print("", *lines, sep="\n", flush=True)
        return
    rows = read_rows(options.ledger)
    print(f"{options.workload}, B = {batch}: decoder and loss, forward and backward, by data sheet")
    print("\n".join(floors(report, options.card or list(CARDS), batch)))
    beside = compared(report, options.workload, rows)
    print("\nmeasured, and the least time by the ceilings of the same run")
    print("\n".join(beside or ["no row in the ledger has ceilings beside it"]))
    print(f"\nthe paper's run, 10^6 steps: {PAPER_HOURS} hours there on a Quadro RTX 6000")
    print("\n".join(projected(rows) or ["no training step of its size in the ledger"]))


if __name__ == "__main__":
    main()
