"""Launches recorded in place of being made: what the machine code of a step is counted on.

Tensors may lie on the CPU. Each launch goes through Triton's own binder, which finds types,
alignments and constants as it would on a device; then it is written down, and nothing runs. What
kernels were to fill stays uninitialised, so a step that asks for values is not for this.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ._launch import DeviceLimits, pretend

# Where the storages of recorded tensors lie, by where they really do: far apart, so that an address
# outside of one is near no other, and low bits carry into no high ones.
_places: dict[int, int] = {}
_APART = 2**36

_FORMS = {"i32": "<i", "i64": "<q", "u32": "<I", "u64": "<Q", "fp32": "<f"}


@dataclass(frozen=True)
class Memory:
    """A tensor that a launch is given.

    Attributes:
        shape: its sizes.
        dtype: as in "bfloat16".
        bytes: of its elements, each once.
        address: of its first one.
        starts: addresses of its dense stretches, all of one length, where they are several.
    """

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    address: int
    starts: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        """The address behind its last element."""
        if not self.starts:
            return self.address + self.bytes
        return max(self.starts) + self.bytes // len(self.starts)


@dataclass(frozen=True)
class Launch:
    """One launch, with all that its compilation depends on.

    Attributes:
        kernel: the `triton.jit` function.
        signature: the type of each parameter by name, "constexpr" where it is compiled in; of a
            tuple its parts'.
        constants: what is compiled in, by its position.
        attributes: what is known of the others, by position.
        options: num_warps and the like.
        grid: programs along each axis.
        values: of the arguments at run time by name: numbers, and tensors as `Memory`; the parts
            of a tuple as "name.0" and so on.
    """

    kernel: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]
    grid: tuple[int, ...]
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.kernel.__name__

    @property
    def programs(self) -> int:
        """How many run; of a kernel that is told how many do its work, `programs`, those."""
        return self.values.get("programs", math.prod(self.grid))

    @property
    def num_warps(self) -> int:
        """Of one program."""
        return self.options.get("num_warps", 4)

    @property
    def compilation(self) -> tuple:
        """Equal for two launches of the same machine code."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return (self.name, *(repr(sorted(part.items(), key=repr)) for part in parts))

    @property
    def moved(self) -> int:
        """Bytes of all tensors that it is given, each once."""
        return sum({m.address: m.bytes for m in self.memories.values()}.values())

    @property
    def memories(self) -> dict[str, Memory]:
        """Its tensors; of two that start at one address, as where one stands in, the first."""
        found: dict[int, tuple[str, Memory]] = {}
        for name, value in self.values.items():
            if isinstance(value, Memory):
                found.setdefault(value.address, (name, value))
        return dict(found.values())

    @property
    def arguments(self) -> bytes:
        """What it is given at run time, as it lies in a device's constant memory."""
        packed = b""
        types = dict(_flat(self.signature))
        for name, value in self.values.items():
            kind = types[name]
            form = "<Q" if kind.startswith("*") else _FORMS[kind]
            size = struct.calcsize(form)
            packed += bytes(-len(packed) % size)
            packed += struct.pack(form, value.address if isinstance(value, Memory) else value)
        return packed

    def compile(self, arch: int) -> Any:
        """Compile for ``sm_<arch>`` as the launch would."""
        return triton.compile(
            ASTSource(self.kernel, self.signature, self.constants, self.attributes),
            target=GPUTarget("cuda", arch, 32),
            options=dict(self.options),
        )


class _Absent:
    """A driver of a card that is not there."""

    def __init__(self, arch: int):
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def address_of(tensor: torch.Tensor) -> int:
    """Where a tensor lies in a recorded launch: the same in every run that allocates alike."""
    storage = tensor.untyped_storage().data_ptr()
    place = _places.setdefault(storage, _APART * (1 + len(_places)))
    return place + tensor.data_ptr() - storage


def _flat(of: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """By name, each part of a tuple by itself; what is compiled in has no parts."""
    for name, value in of.items():
        if isinstance(value, tuple):
            yield from ((f"{name}.{i}", part) for i, part in enumerate(value))
        else:
            yield name, value


def stretches_of(tensor: torch.Tensor) -> tuple[list[int], int]:
    """Addresses of a tensor's stretches that are dense on their own, and the bytes of each."""
    size = tensor.element_size()
    # Innermost first; what is repeated lies in memory once.
    axes = sorted((st, n) for st, n in zip(tensor.stride(), tensor.shape, strict=True) if st)
    dense, outer = 1, []
    for stride, extent in axes:
        if stride == dense and not outer:
            dense *= extent
        elif extent > 1:
            outer.append((stride, extent))
    starts = [address_of(tensor)]
    for stride, extent in reversed(outer):
        starts = [start + size * stride * at for start in starts for at in range(extent)]
    return starts, size * dense


def _described(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    bytes_, (starts, each) = value.numel() * value.element_size(), stretches_of(value)
    several = len(starts) > 1 and len(starts) * each == bytes_
    return Memory(
        *(tuple(value.shape), str(value.dtype).removeprefix("torch.")),
        *(bytes_, address_of(value), tuple(starts) if several else ()),
    )


@contextlib.contextmanager
def recorded(limits: DeviceLimits) -> Iterator[list[Launch]]:
    """Write launches down inside a block as on a device of these limits; gives the list."""
    launches: list[Launch] = []
    _places.clear()

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        *_, backend, binder = self.create_binder()
        bound, specialization, options = binder(*args, debug=False, **kwargs)
        _, signature, constants, attributes = self._pack_args(
            backend, {"debug": False, **kwargs}, bound, specialization, options
        )
        types = dict(_flat(signature))
        # A tuple that is compiled in has one type.
        values = {
            n: _described(v) for n, v in _flat(bound) if types.get(n, "constexpr") != "constexpr"
        }
        chosen = {n: v for n, v in kwargs.items() if n not in signature and v is not None}
        grid = grid(bound) if callable(grid) else grid
        launches.append(Launch(self, signature, constants, attributes, chosen, tuple(grid), values))

    before = driver.active if driver._active is not None else None
    driver.set_active(_Absent(limits.capability))
    try:
        with pretend(limits), mock.patch.object(JITFunction, "run", run):
            yield launches
    finally:
        driver._active = before
