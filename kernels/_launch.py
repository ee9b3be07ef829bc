"""What every launcher shares: device limits, and the description of a compilation for the audit.

Launches may overlap (programmatic dependent launch): from compute capability 9.0 on a kernel can be
put on the chip while the one in front of it ends, and wait there, which hides most of the time
between the two. `FASTSFVAE_PDL=1` asks for it; without, every kernel begins when the one in front
has ended, as no card has confirmed the other yet.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda.gdc import gdc_launch_dependents, gdc_wait

from ._contract import asked_for

# The interpreter computes tl.dot on bf16 operands from their bit patterns; kernels upcast there.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)

# Whether this is a later compiler than the one that the code was counted with, Triton 3.8.
NEWER = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) > (3, 8))

# Said at every compilation, as what Triton does unasked is about to change: a product and a sum are
# one instruction.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}

# Names the environment variable, and the first compute capability where it counts.
OVERLAP, _OVERLAPPING = "FASTSFVAE_PDL", 90

_TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class DeviceLimits:
    """What launch choices depend on besides shapes.

    Attributes:
        sm_count: streaming multiprocessors of the device.
        capability: compute capability, 86 for 8.6.
        name: as the driver gives it; "" of a device that none was measured on.
    """

    sm_count: int
    capability: int = 80
    name: str = ""


_pretended: ContextVar[DeviceLimits | None] = ContextVar("device_limits", default=None)


@functools.cache
def _cuda_limits(index: int) -> DeviceLimits:
    found = torch.cuda.get_device_properties(index)
    return DeviceLimits(found.multi_processor_count, 10 * found.major + found.minor, found.name)


def device_limits(tensor: torch.Tensor) -> DeviceLimits:
    """Limits of the device that holds `tensor`; a small fixed device for the interpreter."""
    pretended = _pretended.get()
    if pretended is not None:
        return pretended
    if not tensor.is_cuda:
        return DeviceLimits(sm_count=4)
    return _cuda_limits(tensor.get_device())


@contextlib.contextmanager
def pretend(limits: DeviceLimits) -> Iterator[None]:
    """Make launchers choose, inside a block, as on a device that is not at hand."""
    token = _pretended.set(limits)
    try:
        yield
    finally:
        _pretended.reset(token)


@tl.core.builtin
def _take_turns(_semantic: Any = None) -> None:
    if getattr(_semantic.builder.options, "launch_pdl", False):
        gdc_wait(_semantic=_semantic)
        gdc_launch_dependents(_semantic=_semantic)


@triton.jit
def begin():
    """The first statement of every kernel; no instruction where its launch does not overlap.

    It waits until the kernel in front has ended and what that wrote can be read, and so for all in
    front of that one, which has waited likewise. Then it lets the next one come.
    """
    if not INTERPRET:
        _take_turns()


def overlaps(capability: int) -> bool:
    """Whether launches overlap on a device of that compute capability.

    Raises:
        ValueError: an unknown $FASTSFVAE_PDL.
    """
    return bool(asked_for(OVERLAP)) and capability >= _OVERLAPPING


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first argument, a tensor or several, with `OPTIONS`.

    Where launches overlap, it may be put there before the one in front has ended (see `begin`).

    Args:
        kernel: the `triton.jit` function.
        grid: programs along each axis.
        args: the kernel's runtime arguments, in order.
        options: its constexprs by name, and num_warps, num_stages, maxnreg.
    """
    of = args[0][0] if isinstance(args[0], tuple) else args[0]
    if overlaps(device_limits(of).capability):
        options["launch_pdl"] = True
    with torch.cuda.device_of(of):
        kernel[grid](*args, **OPTIONS, **options)


def cdiv(a: int, b: int) -> int:
    """Ceiling division."""
    return -(-a // b)


def empty_sums(
    parts: int, B: int, m: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for G, p and rr in parts: ``[parts, B, m, m]``, ``[parts, B, m]``, ``[parts, B]``."""
    G, p, rr = (
        torch.empty((parts, B, *shape), dtype=dtype, device=device) for shape in ((m, m), (m,), ())
    )
    return G, p, rr


@dataclass(frozen=True)
class Configuration:
    """One compilation that a launcher can ask for, as the audit compiles it.

    Pointers, and integers that the kernel specialises, are divisible by 16 unless named in `odd`:
    what the JIT finds for tensors from the allocator and for the usual sizes and strides.

    Attributes:
        kernel: the `triton.jit` function.
        label: what distinguishes this configuration in the audit's table.
        types: the type of each runtime argument that is not a 32-bit integer, by name: ``"*fp32"``;
            of a tuple its parts'.
        constexprs: every constexpr argument, by name.
        num_warps: warps per program.
        num_stages: software pipeline stages.
        odd: arguments that are not divisible by 16 in this configuration.
        maxnreg: registers that a thread may have; None leaves them to the assembler.
    """

    kernel: Any
    label: str
    types: Mapping[str, str | tuple[str, ...]]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    odd: tuple[str, ...] = ()
    maxnreg: int | None = None


def pointer(dtype: torch.dtype) -> str:
    """Triton's name of a pointer to `dtype`, as a signature spells it."""
    return "*" + _TRITON_NAMES[dtype]


def check_dtypes(**tensors: torch.Tensor) -> None:
    """Raise TypeError unless each tensor is float32, bfloat16 or float16."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _TRITON_NAMES:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}: the Triton kernels take float32, bfloat16 or "
                'float16; use backend="torch" for others'
            )
