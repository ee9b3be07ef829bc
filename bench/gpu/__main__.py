"""Everything a GPU can tell, unattended: `python -m bench.gpu --out DIR --minutes 8`.

Parts run in the order of their importance, each in a process of its own. Every row is written to
DIR/rows.csv (quick.csv with --quick) when it is known; what fails becomes a row that says why. A
second call with the same DIR goes on with what is missing, as does one with another DIR and
--after. Afterwards DIR/README.md says what was found. A plain checkout with torch, triton, numpy
and pytest is enough, and the C compiler with Python's headers that Triton builds its launcher with;
the tests of hostile numbers want hypothesis and mpmath too, and the page's pictures matplotlib.

    python -m bench.gpu --out DIR --only smoke profile     what a first minute tells
    python -m bench.gpu --out DIR --device cpu --quick     the same code, tiny, interpreted
    python -m bench.gpu --out DIR --page                   write the page anew
    python -m bench.gpu --out DIR --merge                  append DIR's times to the ledger, and
                                                           have the library choose by them and by
                                                           the tiles that were the fastest
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
from pathlib import Path

import torch

from bench import choices, ledger
from bench.command import make_parser
from bench.gpu import page, sweep
from bench.gpu.parts import PARTS, with_needed
from bench.gpu.runner import OUT_OF_TIME, Runner
from bench.ledger import Recorder, read_rows
from bench.measure import Context, OutOfTime

ROWS = "rows.csv"
# Apart from the measurements: --merge must not find them.
QUICK_ROWS = "quick.csv"


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, or one of them, or merge."""
    options = _parse(arguments)
    if options.merge:
        print(f"{ledger.merge(read_rows(options.out / ROWS))} rows appended to {ledger.LEDGER}")
        print(f"{choices.update()} devices with measured layers in {choices.MEASURED}")
        print(f"{sweep.merge(options.out)} tiles taken over into {sweep.TILES}")
        return 0
    if options.page:
        return _write_page(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "no CUDA device is usable: give --device cpu --quick to try the runbook",
            file=sys.stderr,
        )
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        return _run_part(options)
    recorder = _recorder(options)
    if options.after and not recorder.path.exists():
        shutil.copytree(options.after, options.out, dirs_exist_ok=True)
    given = ["--out", str(options.out), "--device", options.device]
    given += ["--quick"] * options.quick
    given += ["--commit", options.commit] * bool(options.commit)
    names = with_needed(options.only or PARTS)
    Runner(recorder, options.minutes, given, options.device).run(names)
    return _write_page(options)


def _write_page(options: argparse.Namespace) -> int:
    left_out = page.write(options.out, _rows_name(options), rehearsal=options.quick)
    print(*left_out, f"what was found: {options.out / page.PAGE}", sep="\n")
    return 0


def _rows_name(options: argparse.Namespace) -> str:
    return QUICK_ROWS if options.quick else ROWS


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser("gpu", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of rows, page and logs")
    parser.add_argument("--minutes", type=float, default=8, help="for everything together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the runbook only")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts alone")
    parser.add_argument("--after", type=Path, help="folder of a call before, to go on from")
    parser.add_argument("--commit", help="for a copy of the files that has no git history")
    parser.add_argument("--page", action="store_true", help="write DIR/README.md and its pictures")
    parser.add_argument("--merge", action="store_true", help="take times and tiles over")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _recorder(options: argparse.Namespace) -> Recorder:
    return Recorder(options.out / _rows_name(options), options.device, options.commit)


def _run_part(options: argparse.Namespace) -> int:
    module, function = PARTS[options.part].function.split(":")
    # For every candidate alike.
    torch.backends.cudnn.benchmark = True
    recorder = _recorder(options)
    context = Context(options.device, options.quick, recorder, options.until, goes_on=True)
    try:
        getattr(importlib.import_module(module), function)(context)
    except OutOfTime:
        return OUT_OF_TIME
    return 0


if __name__ == "__main__":
    sys.exit(main())
