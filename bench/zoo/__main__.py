"""Run the list and write its table: see the package's docstring."""

from __future__ import annotations

import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.command import ROOT, make_parser
from bench.zoo.entry import ENTRIES
from bench.zoo.report import report

FIELDS = "audio denoisers diffusion flows graphs operators segmentation tokens vision".split()
OUT = ROOT / "bench/results/zoo.md"
# Seconds that one decoder may take.
LIMIT = 300
MARK = "zoo: "


def chosen(only: list[str] | None) -> dict[str, list[str]]:
    """The names of the list by package; those that contain one of `only`, if it is given."""
    for field in FIELDS:
        importlib.import_module(f"bench.zoo.{field}")
    groups: dict[str, list[str]] = {}
    for name, entry in ENTRIES.items():
        if only is None or any(part in name for part in only):
            groups.setdefault(entry.package, []).append(name)
    return groups


def work(names: Iterable[str]) -> None:
    """In a package's own process: a line when a decoder starts, a line with what was found."""
    from bench.zoo.judge import judge

    def expire(*_: Any) -> None:
        raise TimeoutError(f"more than {LIMIT} seconds")

    torch.set_num_threads(1)
    # Constants that packages make in forward are of the default type.
    torch.set_default_dtype(torch.float64)
    signal.signal(signal.SIGALRM, expire)
    for name in names:
        print(MARK + json.dumps({"name": name}), flush=True)
        signal.alarm(LIMIT)
        try:
            found = judge(ENTRIES[name].make)
        except Exception as error:
            line = str(error).strip().split("\n")[0][:300]
            found = {"outcome": "did not run", "why": f"{type(error).__name__}: {line}"}
        signal.alarm(0)
        print(MARK + json.dumps({"name": name} | found), flush=True)


def run(names: list[str]) -> list[dict[str, Any]]:
    """What was found of a package's decoders; a process that dies costs the one that it was at."""
    results: list[dict[str, Any]] = []
    left = list(names)
    while left:
        command = [sys.executable, "-m", "bench.zoo", "--worker", *left]
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        found = [json.loads(line.removeprefix(MARK)) for line in lines]
        over = [one for one in found if "outcome" in one]
        results += over
        left = left[len(over) :]
        if left:
            why = f"the process died ({done.returncode}): {done.stderr.strip()[-200:]}"
            results.append({"name": left.pop(0), "outcome": "did not run", "why": why})
    for one in results:
        print(f"{one['name']:50s} {one['outcome']:12s} {one.get('why', '')}", flush=True)
    return results


def version(package: str) -> str:
    """Of an installed package; "missing" where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def main() -> int:
    """Run, print, write; return 1 where anything is wrong or ends in a raw error."""
    parser = make_parser("zoo", __doc__)
    parser.add_argument("--only", action="append", help="decoders whose name contains this")
    parser.add_argument("--out", type=Path, default=OUT, help="where the table goes")
    parser.add_argument("--jobs", type=int, default=1, help="packages at a time")
    parser.add_argument("--worker", nargs="+", metavar="NAME", help="used by the command itself")
    options = parser.parse_args()
    groups = chosen(options.only)
    if options.worker:
        work(options.worker)
        return 0
    start = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        results = [one for found in pool.map(run, groups.values()) for one in found]
    versions = {name: version(name) for name in groups}
    machine = f"Python {platform.python_version()}, torch {torch.__version__}, one CPU core"
    text = report(results, versions, machine, time.monotonic() - start)
    options.out.write_text(text)
    print(text)
    return int(any(one["outcome"] in ("wrong", "raw error") for one in results))


if __name__ == "__main__":
    sys.exit(main())
