"""`make trust`: look for what breaks, two parts at a time, and print one table of what was found.

Each part is a run of pytest with more cases than a test draws by itself; it records what it counted
and the largest errors (`tests/conftest.py`). The table goes to a file as well:
bench/results/trust.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
# What may not have happened, whatever was tried.
NEVER = ("NaNs", "lost runs", "taken for whole", "in both splits", "not one line")


class Part(NamedTuple):
    """A run of pytest.

    Attributes:
        name: shown when it is over.
        modules: test modules, as folder/name without the prefix "test_".
        options: of pytest.
        interpreter: whether it is of the Triton kernels.
    """

    name: str
    modules: tuple[str, ...]
    options: tuple[str, ...] = ()
    interpreter: bool = False


# The longest first: they share two cores.
PARTS = (
    Part("random decoders", ("jacobian/random_decoders",), ("--decoders", "2000")),
    Part("a long run", ("loss/soak",), ("--soak-steps", "20000")),
    Part(
        "hostile numbers", ("ops/numerics", "loss/numerics", "ops/low_rank"), ("--examples", "1000")
    ),
    Part("kills", ("training/faults",), ("--kills", "10")),
    Part(
        "compatibility",
        tuple(f"loss/{n}" for n in "compatibility wrappers compose determinism".split()),
    ),
    Part("damage", ("training/damage", "repository/network")),
    Part("images", ("data/hostile_folder", "data/arrays", "data/sources")),
    Part("bad command lines", ("cli/bad_inputs",), ("--processes", "4")),
    Part("kernels", ("ops/numerics", "loss/determinism"), ("-m", "interpreter"), interpreter=True),
)


def file_of(module: str) -> str:
    """The path of a test module from the root."""
    folder, _, name = module.partition("/")
    return f"tests/{folder}/test_{name}.py"


def run(part: Part, record: Path) -> int:
    """Run a part, print how it ended, and return pytest's exit code."""
    files = [file_of(name) for name in part.modules]
    command = [sys.executable, "-m", "pytest", *files, *part.options, "--record", str(record)]
    # One core a part.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if part.interpreter:
        environment["TRITON_INTERPRET"] = "1"
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    ended = done.stdout.strip().splitlines()[-1:]
    print(f"{part.name}: {time.monotonic() - started:.0f} s: {''.join(ended)}", flush=True)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", flush=True)
    return done.returncode


def join(records: list[dict]) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    """Counts added up and largest errors of several runs, by subject and name."""
    counts: dict[str, dict[str, int]] = {}
    errors: dict[str, dict[str, float]] = {}
    for record in records:
        for subject, found in record["counts"].items():
            of_subject = counts.setdefault(subject, {})
            for name, count in found.items():
                of_subject[name] = of_subject.get(name, 0) + count
        for subject, measured in record["errors"].items():
            largest = errors.setdefault(subject, {})
            for name, value in measured.items():
                largest[name] = max(value, largest.get(name, 0.0))
    return counts, errors


def table(counts: dict[str, dict[str, int]], errors: dict[str, dict[str, float]]) -> str:
    """A row a subject, then the sums of what was tried and of what must not be."""
    lines = ["| subject | counted | largest errors |", "|---|---|---|"]
    for subject in sorted(counts.keys() | errors.keys()):
        counted = ", ".join(f"{n:,} {name}" for name, n in counts.get(subject, {}).items())
        worst = ", ".join(f"{name} {v:.1e}" for name, v in errors.get(subject, {}).items())
        lines.append(f"| {subject} | {counted} | {worst} |")
    if not torch.cuda.is_available():
        lines.append("| TF32 products, and everything on a GPU | | not measured on a GPU yet |")
    sums = {name: sum(c.get(name, 0) for c in counts.values()) for name in ("cases", "faults")}
    sums |= {name: sum(c.get(name, 0) for c in counts.values()) for name in NEVER}
    in_all = ", ".join(f"{n:,} {name}" for name, n in sums.items())
    return "\n".join([*lines, f"| **in all** | **{in_all}** | |"])


def report(text: str, seconds: float) -> str:
    """The file that holds a table: what made it, and where."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return (
        "# What was tried to break it\n\n"
        f"`make trust` wrote this: {versions}, {os.cpu_count()} CPU cores, "
        f"{time.strftime('%Y-%m-%d')}, {seconds / 60:.1f} minutes.\n\n"
        'An error "of its bound" is a share of what rounding alone allows, derived for each '
        "case; other errors say of what.\n\n"
        f"{text}\n"
    )


def main() -> int:
    """Run the parts, print the table and write it; 0 if every test passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table there")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS])
    options = parser.parse_args()
    parts = [part for part in PARTS if options.only is None or part.name in options.only]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{index}.json" for index in range(len(parts))]
        with ThreadPoolExecutor(2) as pool:
            codes = list(pool.map(run, parts, paths))
        records = [json.loads(path.read_text()) for path in paths if path.exists()]
    counts, errors = join(records)
    text = table(counts, errors)
    print(f"\n{text}")
    if options.out is not None and not any(codes) and options.only is None:
        options.out.write_text(report(text, time.monotonic() - started))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
