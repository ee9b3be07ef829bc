"""Where a step's time goes: `python -m bench.profile [--dtype bfloat16] [--trace FILE]`.

Prints each named range's share of a training step by torch.profiler, on CUDA by the device's time.
The library's ranges are listed in fastsfvae/_ranges.py. For Nsight Systems, on any script:

    FASTSFVAE_RANGES=1 nsys profile --trace=cuda,nvtx,cudnn,cublas -o step python -m bench.profile
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.command import make_parser
from bench.peers import OURS, SAMPLING, STEPS, TRITON
from bench.problems import WORKLOADS, autocast, build_problem
from fastsfvae._ranges import recording, span

STEP = "step"


def shares(
    workload: str,
    implementation: str,
    batch: int | None,
    device: str,
    trace: Path | None = None,
    dtype: str = "float32",
) -> dict[str, float]:
    """Each range's milliseconds of one step, with "step" for the whole of it.

    A range inside another counts in both; what lies in none is "step" less the outer ones.
    """
    problem = build_problem(workload, batch, device=device)
    objective = STEPS[implementation](problem.encoder, problem.decoder)
    leaves = [*problem.encoder.parameters(), *problem.decoder.parameters()]
    optimizer = torch.optim.Adam(leaves, lr=0.0, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(dtype, device):
            loss = objective(problem.x)
        with span("backward"):
            loss.backward()
        with span("optimizer"):
            optimizer.step()

    step()
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    rounds = 3
    with recording(), profile(activities=activities) as profiler:
        for _ in range(rounds):
            with record_function(STEP):
                step()
            if cuda:
                torch.cuda.synchronize()
    if trace:
        profiler.export_chrome_trace(str(trace))
    field = "device_time_total" if cuda else "cpu_time_total"
    return {
        event.key: getattr(event, field) / 1e3 / rounds
        for event in profiler.key_averages()
        # The optimizer announces itself too, with a "#".
        if event.is_user_annotation and "#" not in event.key
    }


def table(found: dict[str, float]) -> str:
    """Ranges by their time, with their share of the step."""
    whole = found[STEP]
    lines = [
        f"{name:40s} {ms:9.2f} ms  {ms / whole:6.1%}"
        for name, ms in sorted(found.items(), key=lambda item: -item[1])
    ]
    return "\n".join(lines)


def main() -> None:
    """Profile the step that the command line names."""
    parser = make_parser("profile", __doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--workload", choices=WORKLOADS, default="celeba16")
    parser.add_argument("--batch", type=int, help="default: the workload's own")
    parser.add_argument("--implementation", choices=(OURS, TRITON, SAMPLING))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--trace", type=Path, help="also write a trace for chrome://tracing")
    options = parser.parse_args()
    implementation = options.implementation or (TRITON if cuda else OURS)
    device = "cuda" if cuda else "cpu"
    sizes = options.workload, implementation, options.batch
    found = shares(*sizes, device, options.trace, options.dtype)
    where = f"{device}, {torch.get_num_threads()} threads"
    print(f"{options.workload}, {implementation}, {options.dtype}, {where}")
    print(table(found))


if __name__ == "__main__":
    main()
