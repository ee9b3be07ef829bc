"""The sums that a layer's gradients end in: of its weight's parts, and of the bias's.

    g_w = sum over parts of part_w        g_b[c] = sum over rows of g_0[row, c]

The bias's gradient sums the values' gradient, slot 0 of a stack, over all positions. Some more
programs of the weight's kernel sum its rows in parts (`column_sums`).

Parts lie in rooms, which outlive a launch: the launches of the next samples add theirs to what they
find there (`Room.filled`), each program to its own, so the order of summation is fixed. When all
samples have been pulled, one launch adds up the parts of every weight and bias (`add_up`).

Floor: the parts once, from L2; slot 0 once, 4 MB of bfloat16 for 32 channels, 32 x 32 pixels and
64 samples. Latency bounds the sums of small layers: of many parts a program takes more at a time,
and fewer columns, so that a small weight has programs enough and each few loads in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Configuration, begin, cdiv, launch

_TILE = 2048
_MOST_PARTS = 64
# Parts and columns that a program adds up at a time, of few parts and of more than so many.
_FEW_PARTS, _FEW_COLUMNS = tl.constexpr(16), tl.constexpr(256)
_MANY_PARTS, _MANY_COLUMNS = tl.constexpr(128), tl.constexpr(32)
_MOST_FEW = tl.constexpr(64)
# Left to itself, an older compiler takes few registers on sm_80, and spills.
_OPTIONS = {"num_warps": 4, "maxnreg": 128}
# Sums of a launch.
_AT_A_TIME = 16


class Room(NamedTuple):
    """Where a launch leaves the parts of a sum.

    Attributes:
        parts: dense float32 ``[P, width]``, of `padded` width.
        filled: whether they hold what the launch is to add its own to.
    """

    parts: Tensor
    filled: bool = False


# A launch's room, by how many parts it will leave there.
Rooms = Callable[[int], Room]


@triton.constexpr_function
def padded(size):
    """Numbers from a part to the next one, so that each starts where 16 bytes do."""
    return (size + 3) // 4 * 4


class Partial:
    """The parts of one sum, of all launches that add to it: `Rooms` for them.

    Args:
        size: of the sum.
        device: where it is.

    Attributes:
        size: likewise.
        parts: of a room, all of them.
    """

    def __init__(self, size: int, device: torch.device):
        self.size, self._options = size, {"dtype": torch.float32, "device": device}
        self.parts = torch.empty((0, padded(size)), **self._options)

    def __call__(self, count: int) -> Room:
        """Room for a launch's parts, as many as that."""
        before, width = self.parts.shape
        if before == 0:
            self.parts = torch.empty((count, width), **self._options)
        elif before < count:
            more = torch.zeros((count - before, width), **self._options)
            self.parts = torch.cat((self.parts, more))
        return Room(self.parts[:count], before > 0)


@triton.jit
def column_sums(
    g_ptr, sums_ptr, filled, part, parts, rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Store a part's share of the column sums of dense g [rows, COLUMNS], in float32."""
    column = tl.arange(0, WIDTH)
    row = tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(part * ROWS, rows, parts * ROWS):
        at = (start + row).to(tl.int64)[:, None] * COLUMNS + column[None, :]
        inside = (start + row < rows)[:, None] & (column < COLUMNS)[None, :]
        acc += tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    add_to(sums_ptr + part * padded(COLUMNS) + column, tl.sum(acc, 0), column < COLUMNS, filled)


@triton.jit
def add_to(ptrs, part, mask, filled):
    """Store a part of a sum where nobody else does, added to what is there if that is one."""
    if filled:
        part += tl.load(ptrs, mask=mask, other=0.0)
    tl.store(ptrs, part, mask=mask)


def tile_of(columns: int) -> dict[str, int]:
    """What `column_sums` has compiled in for that many columns; 0 for none."""
    width = triton.next_power_of_2(columns) if columns else 1
    return {"COLUMNS": columns, "ROWS": max(1, _TILE // width), "WIDTH": width}


class Bias(NamedTuple):
    """What a launch is told of the bias's gradient.

    Attributes:
        room: for its parts; None where it is not wanted.
        count: Q, the programs that fill it, of four tiles of rows at least.
        rows: of the result's gradient in slot 0.
    """

    room: Room | None
    count: int
    rows: int


def bias_of(result: Tensor, columns: int, rooms: Rooms | None) -> Bias:
    """The bias's part in a launch.

    Args:
        result: the gradient of the layer's result, a dense stack.
        columns: of the bias.
        rooms: for its parts; None where its gradient is not wanted.
    """
    if rooms is None:
        return Bias(None, 0, 0)
    rows = result[0].numel() // columns
    count = max(1, min(_MOST_PARTS, rows // (4 * tile_of(columns)["ROWS"])))
    return Bias(room_of_width(rooms, count, columns), count, rows)


def room_of_width(rooms: Rooms, count: int, size: int) -> Room:
    """Room for so many parts of a sum of that size."""
    room = rooms(count)
    assert room.parts.shape == (count, padded(size)), (room.parts.shape, count, size)
    return room


class Sum(NamedTuple):
    """A sum over parts, and where it goes.

    Attributes:
        parts: of a room, of numbers ``[rows, taps, channels]``.
        out: dense memory for the sum, of any dtype; turned, it is stored as
            ``[rows, channels, taps]``.
        taps: as there; 1 where `out` is in the parts' order.
        channels: likewise.
    """

    parts: Tensor
    out: Tensor
    taps: int = 1
    channels: int = 1

    @property
    def block(self) -> int:
        """Columns of a program."""
        few = len(self.parts) <= _MOST_FEW.value
        return (_FEW_COLUMNS if few else _MANY_COLUMNS).value

    @property
    def programs(self) -> int:
        """How many add it up."""
        return cdiv(self.out.numel(), self.block)


@triton.jit
def _of(sum_of, values):
    """What belongs to that sum of a launch."""
    found = values[0]
    for i in tl.static_range(1, len(values)):
        found = tl.where(sum_of >= i, values[i], found)
    return found


@triton.jit
def _total(
    part_ptr, out_ptr, block, count, size, width, taps, channels, TURNED: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, i = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PARTS)
    acc = tl.zeros([PARTS, BLOCK], tl.float32)
    ptrs = part_ptr + i.to(tl.int64)[:, None] * width + at[None, :]
    stride = tl.full([], PARTS, tl.int64) * width
    for start in range(0, count, PARTS):
        inside = (start + i < count)[:, None] & (at < width)[None, :]
        acc += tl.load(ptrs, mask=inside, other=0.0)
        ptrs += stride
    to = at
    if TURNED:
        row, tap, c = at // (taps * channels), at // channels % taps, at % channels
        to = (row * channels + c) * taps + tap
    tl.store(out_ptr + to, tl.sum(acc, 0), mask=at < size)


# Tuples are specialised whatever is said: what the samples' number decides is given as 2 n + 1,
# which is never 1 nor a multiple of 16, and compiles nothing new.
@triton.jit
def _sum_parts_kernel(
    part_ptrs,  # [count, width] each
    out_ptrs,  # [size]; of each [taps, channels] the transpose
    first_programs,  # 2 n + 1
    counts,  # 2 n + 1
    SIZES: tl.constexpr,
    WIDTHS: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TURNED: tl.constexpr,
):
    begin()
    pid = tl.program_id(0)
    i = 0
    for n in tl.static_range(1, len(part_ptrs)):
        i = tl.where(pid >= first_programs[n] >> 1, n, i)
    block, count = pid - (_of(i, first_programs) >> 1), _of(i, counts) >> 1
    parts, out = _of(i, part_ptrs), _of(i, out_ptrs)
    size, width = _of(i, SIZES), _of(i, WIDTHS)
    taps, channels = _of(i, TAPS), _of(i, CHANNELS)
    given = parts, out, block, count, size, width, taps, channels, TURNED
    if count <= _MOST_FEW:
        _total(*given, _FEW_PARTS, _FEW_COLUMNS)
    else:
        _total(*given, _MANY_PARTS, _MANY_COLUMNS)


def add_up(sums: Sequence[Sum]) -> None:
    """Add up the parts of some sums, each in a fixed order, in a launch for sixteen of a dtype."""
    alike: dict[tuple[torch.dtype, torch.device], list[Sum]] = {}
    for one in sums:
        alike.setdefault((one.out.dtype, one.out.device), []).append(one)
    batches = [
        of[start : start + _AT_A_TIME]
        for of in alike.values()
        for start in range(0, len(of), _AT_A_TIME)
    ]
    for some in batches:
        ends = [0, *itertools.accumulate(s.programs for s in some)]
        programs = ends.pop()
        launch(
            *(_sum_parts_kernel, (programs,)),
            *(tuple(s.parts for s in some), tuple(s.out for s in some)),
            tuple(2 * first + 1 for first in ends),
            tuple(2 * len(s.parts) + 1 for s in some),
            **_constexprs(some),
            **_OPTIONS,
        )


def totals(
    of_weight: Partial, of_bias: Partial | None, shape: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """A layer's two sums at once, float32: the weight's in that shape, and the bias's if any."""
    partial = [p for p in (of_weight, of_bias) if p is not None]
    found = [torch.empty((p.size,), dtype=torch.float32, device=p.parts.device) for p in partial]
    add_up([Sum(p.parts, out) for p, out in zip(partial, found, strict=True)])
    return found[0].view(shape), None if of_bias is None else found[1]


def _constexprs(sums: Sequence[Sum]) -> dict[str, Any]:
    return {
        "SIZES": tuple(s.out.numel() for s in sums),
        "WIDTHS": tuple(padded(s.out.numel()) for s in sums),
        "TAPS": tuple(s.taps for s in sums),
        "CHANNELS": tuple(s.channels for s in sums),
        "TURNED": any(s.taps > 1 for s in sums),
    }


def configurations() -> Iterator[Configuration]:
    """A layer's two sums, as they are stored turned, and as many as one launch takes."""
    room = torch.empty(1, 1536), torch.empty(1, 48)
    for label, count, order in (
        ("a layer", 1, (1, 1)),
        ("a layer turned", 1, (16, 3)),
        ("sixteen", _AT_A_TIME // 2, (1, 1)),
    ):
        sums = [Sum(room[0], room[0][0], *order), Sum(room[1], room[1][0])] * count
        types = dict.fromkeys(("part_ptrs", "out_ptrs"), ("*fp32",) * len(sums))
        types |= dict.fromkeys(("first_programs", "counts"), ("i32",) * len(sums))
        yield Configuration(_sum_parts_kernel, label, types, _constexprs(sums), **_OPTIONS)
