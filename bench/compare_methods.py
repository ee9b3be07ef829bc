"""Sampling-free (precision, expected) and sampling VAEs on the digits: equal steps, equal seconds.

    python bench/compare_methods.py --steps 1500 --seeds 0

Each method trains the default MLP for the same number of steps; then every other method goes on (or
starts again, where it was slower) until it has trained for about as long as `precision` did. Writes
bench/results/methods.csv and prints a markdown table, with the constant -(n/2) log(2 pi c) left out
of the table and included in the file.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from fastsfvae import report, training
from fastsfvae.config import TrainConfig

RESULTS = Path(__file__).parent / "results" / "methods.csv"
METHODS: dict[str, dict] = {
    "sampling-free, precision": {"method": "sampling-free", "likelihood": "precision"},
    "sampling-free, expected": {"method": "sampling-free", "likelihood": "expected"},
    "sampling": {"method": "sampling"},
}
QUANTITIES = ("sampled ELBO", "log ML", "squared error, sampled", "squared error at the mean", "KL")
LOG_DENSITIES = ("sampled ELBO", "log ML")


def train_and_evaluate(config: TrainConfig, folder: Path, importance_samples: int) -> report.Report:
    """Train a run from its start or its last checkpoint, and evaluate it."""
    if folder.exists():
        run = training.resume(folder, config)
    else:
        run = training.start(config, folder)
    training.train(run)
    if not run.finished:
        raise SystemExit(f"interrupted at step {run.step} of {config.steps}: no table")
    return report.evaluate_run(run, importance_samples=importance_samples)


def compare(base: TrainConfig, folder: Path, importance_samples: int) -> list[dict]:
    """Run all methods under one seed; a row for each method and comparison."""
    rows, budget = [], 0.0
    for name, settings in METHODS.items():
        config = replace(base, **settings)
        target = folder / f"{config.method}-{config.likelihood}-{config.seed}"
        result = train_and_evaluate(config, target, importance_samples)
        rows.append(_row("equal steps", name, config, result))
        # The first method is the one whose time the others are given.
        budget = budget or result.seconds
        if budget != result.seconds:
            longer = replace(config, steps=round(budget * result.steps_per_second))
            if longer.steps < config.steps:
                target = target.with_name(target.name + "-seconds")
            result = train_and_evaluate(longer, target, importance_samples)
            config = longer
        rows.append(_row("equal seconds", name, config, result))
        print(f"seed {config.seed}: {name} done, {result.seconds:.1f} s", flush=True)
    return rows


def _row(comparison: str, name: str, config: TrainConfig, result: report.Report) -> dict:
    test = result.splits["test"]
    conventions = result.conventions
    return {
        "comparison": comparison,
        "name": name,
        "seed": config.seed,
        "steps": config.steps,
        "seconds": round(result.seconds, 2),
        "steps_per_second": round(result.steps_per_second, 2),
        **{
            column: round(value, 4)
            for quantity in QUANTITIES
            for column, value in (
                (quantity, test[quantity].mean),
                (f"{quantity}, standard error over images", test[quantity].standard_error),
            )
        },
        "log ML, Monte Carlo error": round(result.log_ml_monte_carlo_error, 4),
        "log ML, median effective samples": round(result.median_effective_samples, 1),
        "active": result.collapse["active"],
        "collapsed": result.collapse["collapsed"],
        **conventions,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def markdown(rows: list[dict]) -> str:
    """The table of the README: test images, constant left out, ± standard error over images."""
    lines = [
        "| | method | seed | steps | seconds | sampled ELBO | log ML | error, sampled "
        "| error at the mean | KL |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["comparison"], reverse=True):
        cells = []
        for name in QUANTITIES:
            value = row[name] - (row["constant_value"] if name in LOG_DENSITIES else 0)
            cells.append(f"{value:.2f} ± {row[f'{name}, standard error over images']:.2f}")
        lines.append(
            f"| {row['comparison']} | {row['name']} | {row['seed']} | {row['steps']} "
            f"| {row['seconds']:.0f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_500, help="steps of each method")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--importance-samples", type=int, default=500, help="K of the log ML")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV file")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            base = TrainConfig(steps=options.steps, seed=seed)
            rows += compare(base, Path(folder), options.importance_samples)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
