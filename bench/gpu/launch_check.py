"""Which kernel of a step is wrong: each launch against the interpreter, some programs of it.

    python -m bench.gpu.launch_check --out DIR --workload celeba16 --dtype bfloat16 [--device cpu]

A launch's tensors are kept as they were in front of it; then it runs, and the interpreter runs its
first and last programs and some between (`bench.gpu.interpreted`) on what was kept. Whatever those
change is compared with what the device has left there. So a wrong launch is named with its
configuration and its input, whichever launches before it were wrong too. Launches wait for one
another, and each is written to the log before it is made: of a crash the log's last line is the
kernel.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bench.command import ROOT, make_parser
from bench.measure import Context
from bench.peers import DECODER_LOSSES, TRITON, loss_and_gradients
from bench.problems import WORKLOADS, build_problem, products
from bench.triton_calls import Call, intercepted

OP = "launches"
# Of a launch: how far what it has written may be from the interpreter's, which forms products in
# float32; half precision rounds results to 8 digits, TF32 operands to 11.
TOLERANCE = {"bfloat16": 2e-2, "tf32": 5e-3, "float32": 1e-4}
# Programs of a launch that the interpreter runs.
PROGRAMS = 4
LOG = "launches-{}.txt"
# What a process is said to have ended with where its time was up.
STOPPED = "stopped"
_SANITIZER = "compute-sanitizer"


def search(context: Context, workload: str, implementation: str, dtype: str, seconds: float) -> str:
    """Check a step launch by launch in a process of its own; rows name what is wrong.

    Args:
        context: whose recorder and folder are written to.
        workload: one of `WORKLOADS`.
        implementation: of `DECODER_LOSSES`.
        dtype: "bfloat16", "tf32" or "float32".
        seconds: for all of it.

    Returns:
        What was found, in a line.
    """
    stop = time.monotonic() + seconds
    command = [sys.executable, "-m", "bench.gpu.launch_check", "--out", str(context.folder)]
    command += ["--workload", workload, "--implementation", implementation, "--dtype", dtype]
    command += ["--device", context.device]
    status = _run(command, seconds)
    lines = read_log(context.folder, dtype)
    wrong = [line for line in lines if line.get("note")]
    labels = {"mode": "kernel by kernel", "dtype": dtype}
    for line in wrong[:10]:
        error = f"{line['error']:.2e}" if "error" in line else ""
        note = f"{line['note']}; {line['configuration']}"
        context.recorder.write(
            op=OP,
            implementation=line["kernel"],
            shape=line["shapes"],
            error=error,
            note=note,
            **labels,
        )
    found = f"{len(lines)} launches looked at, {len(wrong)} wrong"
    if wrong:
        found += f", the first {wrong[0]['kernel']}"
    if status == STOPPED:
        # A second call looks further.
        found = f"not run to its end: {found}"
    elif status:
        found += f"; the process ended with status {status}"
    left = stop - time.monotonic()
    if context.device == "cuda" and shutil.which(_SANITIZER) and left > 10:
        found += f"; memcheck: {_memcheck(command, left)}"
    return found


def _run(command: list[str], seconds: float) -> int | str:
    environment = os.environ | {"CUDA_LAUNCH_BLOCKING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return STOPPED
    return done.returncode


def _memcheck(command: list[str], seconds: float) -> str:
    tool = [_SANITIZER, "--tool", "memcheck", "--print-limit", "3", *command, "--plain"]
    try:
        done = subprocess.run(
            tool, cwd=ROOT, timeout=seconds, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done in {seconds:.0f} s"
    lines = [line.strip("= ") for line in done.stdout.splitlines() if line.startswith("=====")]
    errors = [line for line in lines if line.startswith(("Invalid", "ERROR", "Program hit"))]
    return "; ".join(errors[:3]) or "nothing found"


def read_log(folder: Path, dtype: str) -> list[dict[str, Any]]:
    """Launches by what the log says of them; one that the process has ended in says so."""
    path = folder / LOG.format(dtype)
    found: dict[int, dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        found[line["at"]] = found.get(line["at"], {}) | line
    for line in found.values():
        if "seen" not in line:
            line["note"] = "wrong: the process ended in this launch"
    return [*found.values()]


class Checker:
    """Takes launches from `intercepted`, and writes a line for each.

    Args:
        log: where lines go.
        compare: as `bench.gpu.interpreted.Interpreter`.
        tolerance: relative, of what a launch has written.
        wait: until the device has nothing left to do.
    """

    def __init__(self, log: Path, compare: Callable, tolerance: float, wait: Callable[[], None]):
        self._log, self._compare, self._tolerance, self._wait = log, compare, tolerance, wait
        self._count = 0

    def __call__(self, call: Call, go: Callable[[], Any]) -> Any:
        """Make a launch, and check it."""
        at, self._count = self._count, self._count + 1
        self._write(at=at, **described(call))
        self._wait()
        before = on_host(call.arguments)
        result = go()
        self._wait()
        try:
            error, count = self._compare(call, before, on_host(call.arguments))
        except Exception as reason:
            self._write(at=at, seen=f"not compared: {type(reason).__name__}: {reason}"[:300])
            return result
        line = {"at": at, "seen": f"{count} elements", "error": error}
        # Written so that NaN is wrong too.
        if not error <= self._tolerance:
            line["note"] = f"wrong by {error:.1e} against the interpreter"
        self._write(**line)
        return result

    def _write(self, **line: Any) -> None:
        with self._log.open("a") as file:
            file.write(json.dumps(line) + "\n")


def described(call: Call) -> dict[str, str]:
    """Kernel, configuration and input of a launch."""
    shapes = [
        f"{name} {'x'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}"
        for name, t in call.tensors.items()
    ]
    named = {name.partition(".")[0] for name in call.tensors}
    numbers = {name: value for name, value in call.arguments.items() if name not in named}
    given = [f"{name}={value}" for name, value in (numbers | call.options).items()]
    configuration = f"grid {'x'.join(map(str, call.grid))}; {' '.join(given)}"
    return {"kernel": call.kernel, "shapes": "; ".join(shapes), "configuration": configuration}


def on_host(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with tensors on the host, which share memory as those do."""
    storages: dict[int, torch.UntypedStorage] = {}

    def copied(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.cpu() if t.is_cuda else storage.clone()
        kept = torch.empty(0, dtype=t.dtype)
        return kept.set_(storages[storage.data_ptr()], t.storage_offset(), t.size(), t.stride())

    return tree_map_only(Tensor, lambda t: copied(t.detach()), arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run one step, checked or plain."""
    parser = make_parser("gpu.launch_check", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the log")
    parser.add_argument("--workload", choices=WORKLOADS, default="celeba16")
    parser.add_argument("--implementation", choices=DECODER_LOSSES, default=TRITON)
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--plain", action="store_true", help="the step alone, for another tool")
    options = parser.parse_args(arguments)
    # Late: it is another process that computes by it.
    from bench.gpu.interpreted import Interpreter

    problem = build_problem(options.workload, device=options.device)
    loss = DECODER_LOSSES[options.implementation](problem.decoder)

    def run() -> None:
        with products(options.dtype):
            loss_and_gradients(loss, problem, options.dtype)

    if options.plain:
        run()
        return
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / LOG.format(options.dtype)
    log.unlink(missing_ok=True)
    wait = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    with tempfile.TemporaryDirectory() as folder, Interpreter(Path(folder)) as interpreter:
        with intercepted(Checker(log, interpreter.error, TOLERANCE[options.dtype], wait)):
            run()


if __name__ == "__main__":
    main()
