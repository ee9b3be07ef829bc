"""Where a step's time goes, kernel by kernel: torch.profiler over replays of the captured step.

An eager step is profiled first, with a range around each launch that says what it is: operation,
bytes, FLOPs. The captured step's kernels are the same in the same order, or else are told by their
names. What a trace does not tell stays blank; the traces stay in DIR/traces.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import flop_registry

from bench import cases_steps, trace
from bench.counting import LibraryCalls, constants_kept
from bench.kernel_counts import bytes_of, flops_of, part_of
from bench.launches import other_launch
from bench.ledger import read_rows
from bench.measure import Case, Context
from bench.peers import FUSED, SAMPLING, TRITON, UNFUSED
from bench.timing import captured, time_events, time_wall
from bench.trace import Kernel
from bench.triton_calls import Call, intercepted

OP, LOSS, STEP = "profile", "loss", "training step"
TABLE, TRACES = "profile.csv", "traces"
COLUMNS = (
    "step", "implementation", "dtype", "launch", "kernel", "name", "launches", "us", "share",
    "bytes", "gb_per_s", "flops", "tflop_per_s", "registers", "shared",
    "threads", "device", "torch", "triton", "commit", "date",
)  # fmt: skip
# Runs under the profiler, and small kernels in front of the eager ones: a session of CUDA 12.6 to
# 13.0 loses the first, each one more than that before it.
EAGER, REPLAYS, AHEAD = 3, 20, 500
_RUN, _AT = "run:", "at:"
# The host's too where the device's alone are read: sessions without them were seen to lose kernels.
_ACTIVITIES = [ProfilerActivity.CPU, ProfilerActivity.CUDA]


class Origin(NamedTuple):
    """What a kernel was launched for.

    Attributes:
        label: operation or kernel, and shapes.
        bytes: of its tensors, each once; None where they are not known.
        flops: likewise.
        kernel: of this library's, the binary's name.
    """

    label: str
    bytes: float | None = None
    flops: float | None = None
    kernel: str | None = None


# A kernel of a step, and what it is for.
Found = tuple[Kernel, Origin | None]


def part(context: Context) -> None:
    """Profile step after step, those that decide most first."""
    # Else the profiler may leave and come back between two graphs, which has crashed.
    os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    for step, case in _steps(context):
        labels = case.labels | {"op": OP}
        launches = ["eager", "graph"] if context.device == "cuda" else ["eager"]
        named = {launch: labels | {"mode": f"{step}, {launch}"} for launch in launches}
        # The first is known where the case has ended its process.
        if context.known(labels) or all(map(context.known, named.values())):
            continue
        with context.running(labels):
            try:
                _profiled(context, step, case, named)
            except Exception as reason:
                context.fail(named[launches[-1]], reason)


def _steps(context: Context) -> Iterator[tuple[str, Case]]:
    device, name = context.device, "tiny" if context.quick else "celeba16"
    for dtype in ("bfloat16",) if context.quick else ("bfloat16", "tf32", "float32"):
        given = {"dtypes": [dtype], "implementations": [TRITON, FUSED, UNFUSED]}
        for case in cases_steps.decoder_loss(device, [name], **given):
            yield LOSS, case
        given["implementations"] = [SAMPLING, TRITON]
        for case in cases_steps.training_step(device, [name], **given):
            yield STEP, case


def _profiled(context: Context, step: str, case: Case, named: dict[str, dict[str, str]]) -> None:
    """Profile an eager step and, on a GPU, a captured one."""
    run = case.prepare().runs[0]
    cuda = context.device == "cuda"
    run()
    measured = time_events([run], 0.1) if cuda else time_wall([run], 0.0)
    stem = f"{step} {case.implementation} {case.dtype}".replace(" ", "-").replace(",", "")
    found = _eager(run, context.folder / TRACES / f"{stem}-eager.json.gz", cuda)
    _write(context, step, case, named["eager"], found, 1e3 * measured.p50)
    if not cuda:
        return
    # Not the calls: their tensors would keep memory that the step gives out again.
    calls: list[Origin] = []

    def noted() -> Any:
        calls.clear()
        with intercepted(lambda call, go: (calls.append(of_call(call)), go())[1]):
            return run()

    replay, _ = captured(noted)
    measured = time_events([replay], 0.2)
    kernels = _graph(replay, context.folder / TRACES / f"{stem}-graph.json.gz")
    matched = matching(kernels, found, calls)
    _write(context, step, case, named["graph"], matched, 1e3 * measured.p50)


def _eager(run: Callable[[], Any], path: Path, cuda: bool) -> list[Found]:
    """A step's kernels in order, with their origins."""
    activities = _ACTIVITIES if cuda else _ACTIVITIES[:1]
    origins: dict[str, Origin] = {}
    with profile(activities=activities) as profiler:
        if cuda:
            lost = torch.zeros(1, device="cuda")
            for _ in range(AHEAD):
                lost.neg_()
        with _told(origins):
            for at in range(EAGER):
                with record_function(f"{_RUN}{at}"):
                    run()
                    if cuda:
                        torch.cuda.synchronize()
    kept = _kept(profiler, path)
    if not cuda:
        # There are no kernels: what launches one stands for it.
        ranges = [r for r in kept.ranges if r.name.startswith(_AT)]
        kept = kept._replace(
            kernels=[Kernel("", r.start, r.end - r.start, r.start) for r in ranges]
        )
    return of_eager(kept, origins)


def of_eager(of: trace.Trace, origins: dict[str, Origin]) -> list[Found]:
    """One run's kernels with median times, and the origins that their ranges name."""
    runs: dict[str, list[tuple[Kernel, str | None]]] = {}
    inner = trace.within(of, _AT, (kernel.launched for kernel in of.kernels))
    # By the host's clock, which a device's may lie apart from. Without a launch: every run waits.
    began = (k.start if k.launched is None else k.launched for k in of.kernels)
    outer = trace.within(of, _RUN, began)
    for kernel, at, number in zip(of.kernels, inner, outer, strict=True):
        if number is not None:
            runs.setdefault(number, []).append((kernel, at))
    kernels = trace.medians([[kernel for kernel, _ in run] for run in runs.values()])
    names = [kernel.name for kernel in kernels]
    for run in runs.values():
        if [kernel.name for kernel, _ in run] == names:
            return [(k, origins.get(at or "")) for k, (_, at) in zip(kernels, run, strict=True)]
    return []


def _graph(replay: Callable[[], Any], path: Path) -> list[Kernel]:
    with profile(activities=_ACTIVITIES) as profiler:
        for _ in range(REPLAYS):
            replay()
        torch.cuda.synchronize()
    return trace.medians(trace.replays(_kept(profiler, path), REPLAYS))


def _kept(profiler: profile, path: Path) -> trace.Trace:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    profiler.export_chrome_trace(str(path))
    return trace.read(path)


@contextmanager
def _told(origins: dict[str, Origin]) -> Iterator[None]:
    """Put a range around every launch, and say what it is."""

    def ranged(go: Callable[[], Any]) -> tuple[str, Any]:
        name = f"{_AT}{len(origins)}"
        origins[name] = Origin("")
        with record_function(name):
            return name, go()

    def library(func: Any, given: tuple[tuple, dict], go: Callable[[], Any]) -> Any:
        name, result = ranged(go)
        origins[name] = of_operation(func, given, result)
        return result

    def kernel(call: Call, go: Callable[[], Any]) -> Any:
        name, result = ranged(go)
        origins[name] = of_call(call)
        return result

    with ExitStack() as stack:
        stack.enter_context(constants_kept())
        stack.enter_context(intercepted(kernel))
        stack.enter_context(LibraryCalls(library))
        yield


def of_call(call: Call) -> Origin:
    """The origin of one of this library's launches: its two largest tensors tell it apart."""
    # Of two on the same memory one stands in for what is not there.
    tensors = {t.data_ptr(): t for t in call.tensors.values()}.values()
    largest = sorted(tensors, key=lambda t: -t.numel() * t.element_size())[:2]
    shapes = ["x".join(map(str, t.shape)) for t in tensors if any(t is other for other in largest)]
    label = " ".join((call.kernel, *shapes, *part_of(call)))
    return Origin(label, bytes_of(call), flops_of(call.kernel, call.arguments), call.kernel)


def of_operation(func: Any, given: tuple[tuple, dict], result: Any) -> Origin:
    """The origin of one of PyTorch's launches."""
    name = func.overloadpacket.__name__
    shapes = [t for t in given[0] if isinstance(t, torch.Tensor)][:2]
    label = " ".join((name, *("x".join(map(str, t.shape)) for t in shapes)))
    try:
        moved = other_launch(func, given, result).moved
    except Exception:
        # A label without its bytes is better than none.
        return Origin(label)
    formula = flop_registry.get(func.overloadpacket)
    flops = formula(*given[0], **given[1], out_val=result) if formula else None
    return Origin(label, moved, flops)


def matching(
    kernels: Sequence[Kernel], eager: Sequence[Found], calls: Sequence[Origin]
) -> list[Found]:
    """What a captured step's kernels are for.

    Args:
        kernels: of a replay, in order.
        eager: of an eager step.
        calls: this library's launches while the step was captured, in order.
    """
    by_name: dict[str, list[Origin | None]] = {}
    for kernel, origin in eager:
        by_name.setdefault(kernel.name, []).append(origin)
    own: dict[str, list[Origin | None]] = {}
    for origin in calls:
        own.setdefault(origin.kernel or "", []).append(origin)
    # What was captured is known better than what a step launches elsewhere.
    by_name |= own
    counts = Counter(kernel.name for kernel in kernels)
    known = {
        name: iter(by_name[name]) for name in counts if len(by_name.get(name, ())) == counts[name]
    }
    return [
        (kernel, next(known[kernel.name]) if kernel.name in known else None) for kernel in kernels
    ]


def _write(
    context: Context,
    step: str,
    case: Case,
    labels: dict[str, str],
    found: Sequence[Found],
    step_us: float,
) -> None:
    """Write a step's table, then its row."""
    lines = table_of(found, step_us)
    launch = labels["mode"].rpartition(" ")[2]
    place = {"step": step, "implementation": case.implementation, "dtype": case.dtype}
    path = context.folder / TABLE
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        for line in lines:
            writer.writerow(context.recorder.provenance | place | {"launch": launch} | line)
    kernels = sum(kernel.us for kernel, _ in found)
    note = f"{len(found)} kernels of {kernels:.1f} us together in a step of {step_us:.1f} us"
    if not found:
        # A second call, in a process of its own, may see them.
        note = "not run to its end: the trace tells no kernels"
    context.recorder.write(**labels, note=note)


def table_of(found: Sequence[Found], step_us: float) -> list[dict[str, str]]:
    """A line for each kernel, the largest first; launches of the same one for alike are summed."""
    alike: dict[tuple, list[Found]] = {}
    for kernel, origin in found:
        alike.setdefault((kernel.name, origin and origin.label), []).append((kernel, origin))
    lines = []
    for (name, label), several in alike.items():
        us = sum(kernel.us for kernel, _ in several)
        sums = {
            field: [getattr(origin, field) for _, origin in several if origin is not None]
            for field in ("bytes", "flops")
        }
        line = {"kernel": label or name, "name": name, "launches": str(len(several))}
        line |= {"us": f"{us:.3f}", "share": f"{us / step_us:.4f}"}
        for field, rate, unit in (("bytes", "gb_per_s", 1e3), ("flops", "tflop_per_s", 1e6)):
            if sums[field] and None not in sums[field]:
                total = sum(sums[field])
                line |= {field: f"{total:.0f}", rate: f"{total / us / unit:.4g}" if us else ""}
        for field in ("registers", "shared"):
            value = getattr(several[0][0], field)
            line[field] = "" if value is None else str(value)
        lines.append(line)
    return sorted(lines, key=lambda line: -float(line["us"]))


def read_kernels(folder: Path) -> list[dict[str, str]]:
    """Rows of a run's table, or none."""
    return read_rows(folder / TABLE)
