"""Compile every configuration that a launcher can choose, for every supported GPU, without one.

    python -m fastsfvae.kernels.audit [--json] [--quick] [--arch 86 ...] [--kernel gram_tail ...]
    python -m fastsfvae.kernels.audit --code [--write-bounds] [the same]

Prints one row per kernel, configuration and architecture, and exits 1 when a required architecture
shows a spill (stack bytes) or more shared memory than its cards give a block. Arguments are
specialised as the JIT would: without the divisibility of aligned pointers and sizes the compiler
reports spills that no launch has, and no vector loads. Odd sizes are rows of their own.

With --code, in a clone, a row is a launch of the paper's workloads at B = 64, and what is printed
is its machine code: see `_code_gate`. It exits 1 where that is more than `bounds.json` allows; with
--write-bounds what is counted becomes the bound. Below stands what a first step waits for: the CPU
time that compiling its kernels takes.

The tiles are chosen for Triton 3.8's code, and the bounds are of it; with another Triton only
spills are errors. With 3.9 no configuration of a required architecture spills either. Of 3.6's code
for 494 launches none spills, and all have the same tensor-core instructions. A loop of a product is
between 0.69 (sm_80, bfloat16, 784 features to 512) and 1.20 times as long (sm_120, TF32, 784 to
512), 0.98 in the median; a whole kernel between 0.60 (sm_80, a data gradient that 3.8 unrolls) and
1.58 times (sm_80, the gradients of the first layer), 1.00 in the median.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import (
    _stack_sums,
    elbo,
    gram_project,
    gram_tail,
    gram_tail_backward,
    latent_layer,
    round_tf32,
    tangent_activation,
    tangent_conv,
    tangent_conv_transpose,
    tangent_linear,
    woodbury,
    woodbury_float64,
)
from ._code_gate import (
    CARDS,
    as_json,
    broken,
    code_rows,
    code_table,
    read_bounds,
    recorded_step,
    write_bounds,
    write_issued,
)
from ._launch import OPTIONS, Configuration, DeviceLimits, pretend
from ._machine_code import resource_usage

# Shared memory that one block can have, in KiB, by compute capability.
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
# Triton emits no tensor-core code for sm_75: its rows are for information.
REQUIRED = frozenset(SHARED_KIB) - {75}
QUICK = (86, 90)

_TENSOR_CORE = re.compile(r"^\s*(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """Resources of one configuration on one architecture.

    Attributes:
        kernel: name of the kernel.
        configuration: what distinguishes it from the kernel's other rows.
        arch: compute capability, 86 for 8.6.
        registers: per thread.
        stack_bytes: per thread, of spills.
        shared_bytes: per block.
        load_bytes: the widest load from device memory by one thread, of at most 16.
        tensor_core: tensor-core instructions in the PTX.
        ok: no spill, and no more shared memory than the card has.
    """

    kernel: str
    configuration: str
    arch: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    load_bytes: int
    tensor_core: int
    ok: bool


def configurations() -> list[Configuration]:
    """Every configuration of every kernel, from the modules that launch them."""
    modules = (
        *(gram_project, elbo, woodbury, woodbury_float64, tangent_activation),
        *(tangent_conv_transpose, tangent_conv, tangent_linear, round_tf32, _stack_sums),
        *(gram_tail, gram_tail_backward, latent_layer),
    )
    return list(chain.from_iterable(module.configurations() for module in modules))


def first_step_seconds(arch: int) -> tuple[int, float]:
    """How many kernels celeba16's first step compiles, float32 products in TF32, and how long.

    Returns:
        The number, and the CPU time of compiling them anew, in seconds.
    """
    step = recorded_step("celeba16", "tf32", arch)
    kernels = {launch.compilation: launch for _, launch in step}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        before = _cpu_seconds()
        for kernel in kernels.values():
            kernel.compile(arch)
        return len(kernels), _cpu_seconds() - before


def _cpu_seconds() -> float:
    # The assembler is another process.
    used = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def compile_configuration(configuration: Configuration, arch: int) -> Row:
    """Compile for ``sm_<arch>`` and read the resources off the machine code."""
    compiled = _compiled(configuration, arch)
    usage = cubin_usage(compiled.asm["cubin"])
    stack, shared = usage["STACK"] + usage["LOCAL"], compiled.metadata.shared
    return Row(
        kernel=configuration.kernel.__name__,
        configuration=configuration.label,
        arch=arch,
        registers=usage["REG"],
        stack_bytes=stack,
        shared_bytes=shared,
        load_bytes=_widest_load(compiled.asm["ptx"]),
        tensor_core=len(_TENSOR_CORE.findall(compiled.asm["ptx"])),
        ok=stack == 0 and shared <= SHARED_KIB[arch] * 1024,
    )


def _compiled(configuration: Configuration, arch: int):
    kernel, constexprs = configuration.kernel, configuration.constexprs
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constexprs:
            signature[name] = "constexpr"
            constants[(index,)] = constexprs[name]
            continue
        given = signature[name] = configuration.types.get(name, "i32")
        if isinstance(given, tuple):
            # Numbers of a tuple are given so that none is a multiple of anything.
            divisible = [(index, i) for i, of in enumerate(given) if of.startswith("*")]
        else:
            divisible = [] if parameter.do_not_specialize else [(index,)]
        if name not in configuration.odd:
            attributes |= dict.fromkeys(divisible, [["tt.divisibility", 16]])
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": configuration.num_warps,
            "num_stages": configuration.num_stages,
            "maxnreg": configuration.maxnreg,
            **OPTIONS,
        },
    )


def cubin_usage(cubin: bytes) -> dict[str, int]:
    """`resource_usage` of machine code in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return resource_usage(path)


def _widest_load(ptx: str) -> int:
    words = re.findall(r"\bld\.global[.\w:]*?(?:\.v(\d))?\.[bfu](\d+)\b", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global.*?\], 0x([0-9a-f]+)", ptx)
    widths = [int(count or 1) * int(bits) // 8 for count, bits in words]
    return max(widths + [int(width, 16) for width in copies], default=0)


def _compile_numbered(job: tuple[int, int]) -> Row:
    # A kernel cannot be pickled, so a worker process finds it by its number.
    index, arch = job
    with pretend(DeviceLimits(sm_count=128, capability=arch)):
        return compile_configuration(configurations()[index], arch)


def audit(archs: Iterable[int], names: Sequence[str] = ("",), one_in: int = 1) -> list[Row]:
    """Compile for `archs` the kernels with any of `names` in theirs, on as many cores as allowed.

    Args:
        archs: compute capabilities, 86 for 8.6.
        names: parts of kernels' names.
        one_in: so many configurations of a kernel are one that is compiled, another on each card.
    """
    chosen: dict[str, list[int]] = {}
    for index, configuration in enumerate(configurations()):
        if any(name in configuration.kernel.__name__ for name in names):
            chosen.setdefault(configuration.kernel.__name__, []).append(index)
    jobs = [
        (index, arch)
        for start, arch in enumerate(archs)
        for indices in chosen.values()
        for index in indices[start % min(one_in, len(indices)) :: one_in]
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        return list(pool.map(_compile_numbered, jobs, chunksize=4))


def _table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    head = ("kernel", "configuration", "sm", "regs", "stack", "shared", "load", "tensor core", "")
    lines = [head]
    for row in rows:
        verdict = "" if row.ok else "FAIL" if row.arch in REQUIRED else "(not required)"
        numbers = (row.arch, row.registers, row.stack_bytes, row.shared_bytes, row.load_bytes)
        cells = (row.kernel, row.configuration, *map(str, (*numbers, row.tensor_core)))
        lines.append((*cells, verdict))
    return lines


def _print(lines: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def _writes_bounds() -> bool:
    """Whether this is the compiler whose code the bounds are of."""
    return tuple(map(int, triton.__version__.split(".")[:2])) == (3, 8)


def _code(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """The command with --code."""
    everything = not (options.quick or options.arch) and options.kernel == [""]
    if options.write_bounds and options.kernel != [""]:
        parser.error("--write-bounds replaces whole steps: give no --kernel")
    if options.write_bounds and not _writes_bounds():
        parser.error(f"the bounds are of Triton 3.8's code, and this is {triton.__version__}")
    archs = [arch for arch in options.arch or (QUICK if options.quick else CARDS) if arch in CARDS]
    small = {"workloads": ["celeba16"], "dtypes": ["bfloat16"]} if options.quick else {}
    rows = code_rows(archs, options.kernel, **small)
    if not rows:
        parser.error("no launch of the workloads is of such a kernel or card")
    if options.write_bounds:
        write_bounds(rows)
        plain = [] if options.quick else code_rows(archs, ["tangent_"], ["celeba16"], ["float32"])
        write_issued([*rows, *plain], Path(__file__).parents[1] / "fastsfvae/ops/issued.json")
    if options.json:
        print(as_json(rows))
    else:
        _print(code_table(rows))
    lines = broken(rows, read_bounds() if _writes_bounds() else None)
    print(*lines, sep="\n", file=sys.stderr)
    if not options.json:
        print(f"{len(rows)} launches, {len(lines)} bounds broken")
    if everything:
        for arch in archs:
            # As where training starts: beside all these rows compiling takes longer.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                count, seconds = fresh.submit(first_step_seconds, arch).result()
            print(
                f"celeba16's first step, its layers fused: {count} kernels compiled for "
                f"sm_{arch} in {seconds:.1f} s of CPU time",
                file=sys.stderr if options.json else sys.stdout,
            )
    return 1 if lines else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastsfvae.kernels.audit", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a part of them, on sm_{' and sm_'.join(map(str, QUICK))}",
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=sorted(SHARED_KIB), help="only these, as in 86"
    )
    parser.add_argument(
        "--kernel", nargs="+", default=[""], help="only kernels with one of these in their name"
    )
    parser.add_argument(
        "--code", action="store_true", help="the machine code of the paper's workloads (in a clone)"
    )
    parser.add_argument(
        "--write-bounds", action="store_true", help="with --code: bound what is counted now"
    )
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("the interpreter compiles nothing: unset TRITON_INTERPRET")
    if options.code or options.write_bounds:
        return _code(options, parser)
    archs = options.arch or (QUICK if options.quick else tuple(SHARED_KIB))
    rows = audit(archs, options.kernel, one_in=4 if options.quick else 1)
    if not rows:
        parser.error(f"no kernel has {' or '.join(map(repr, options.kernel))} in its name")
    failed = [row for row in rows if not row.ok and row.arch in REQUIRED]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _print(_table(rows))
        print(f"{len(rows)} configurations, {len(failed)} that spill or do not fit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
