"""The sums that a layer's gradients end in: of its weight's parts, and of the bias's.

    g_w = sum over parts of part_w        g_b[c] = sum over rows of g_0[row, c]

The bias's gradient sums the values' gradient, slot 0 of a stack, over all positions. Some more
programs of the weight's kernel sum its rows in parts (`column_sums`), and one launch then adds up
both kinds of parts, in a fixed order.

Floor: the parts once, from L2; slot 0 once, 4 MB of bfloat16 for 32 channels, 32 x 32 pixels and
64 samples. Latency bounds the sums of small layers: of many parts a program takes more at a time,
and fewer columns, so that a small weight has programs enough and each few loads in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Configuration, begin, cdiv, launch

_TILE = 2048
_MOST_PARTS = 64
# Parts and columns that a program adds up at a time; the second of more than so many parts.
_FEW = {"PARTS": 16, "BLOCK": 64}, {"num_warps": 4}
_MANY = {"PARTS": 256, "BLOCK": 16}, {"num_warps": 8}
_MOST_FEW = 128


@triton.jit
def column_sums(
    g_ptr, sums_ptr, part, parts, rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
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
    tl.store(sums_ptr + part * COLUMNS + column, tl.sum(acc, 0), mask=column < COLUMNS)


def tile_of(columns: int) -> dict[str, int]:
    """What `column_sums` has compiled in for that many columns; 0 for none."""
    width = triton.next_power_of_2(columns) if columns else 1
    return {"COLUMNS": columns, "ROWS": max(1, _TILE // width), "WIDTH": width}


class Bias(NamedTuple):
    """What a launch is told of the bias's gradient.

    Attributes:
        parts: room for its parts ``[Q, columns]``, float32; None where it is not wanted.
        count: Q, the programs that fill it, of four tiles of rows at least.
        rows: of the result's gradient in slot 0.
    """

    parts: Tensor | None
    count: int
    rows: int


def bias_of(result: Tensor, columns: int) -> Bias:
    """The bias's part in a launch.

    Args:
        result: the gradient of the layer's result, a dense stack.
        columns: of the bias; 0 where its gradient is not wanted.
    """
    if not columns:
        return Bias(None, 0, 0)
    rows = result[0].numel() // columns
    count = max(1, min(_MOST_PARTS, rows // (4 * tile_of(columns)["ROWS"])))
    parts = torch.empty((count, columns), dtype=torch.float32, device=result.device)
    return Bias(parts, count, rows)


@triton.jit
def _total(
    part_ptr, out_ptr, first, count, size, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    TAPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    at, i = first + tl.arange(0, BLOCK), tl.arange(0, PARTS)
    acc = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in range(0, count, PARTS):
        part = (start + i).to(tl.int64)[:, None] * size
        inside = (start + i < count)[:, None] & (at < size)[None, :]
        acc += tl.load(part_ptr + part + at[None, :], mask=inside, other=0.0)
    to = at
    if TAPS > 1:
        row, tap, c = at // (TAPS * CHANNELS), at // CHANNELS % TAPS, at % CHANNELS
        to = (row * CHANNELS + c) * TAPS + tap
    tl.store(out_ptr + to, tl.sum(acc, 0), mask=at < size)


@triton.jit(do_not_specialize=["count", "bias_count", "columns"])
def _sum_parts_kernel(
    part_ptr,  # [count, size]
    out_ptr,  # [size]; with TAPS, of each [TAPS, CHANNELS] the transpose
    bias_part_ptr,  # [bias_count, columns]
    bias_ptr,  # [columns]
    count,
    size,
    bias_count,
    columns,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    begin()
    pid = tl.program_id(0)
    blocks = tl.cdiv(size, BLOCK)
    if pid < blocks:
        _total(part_ptr, out_ptr, pid * BLOCK, count, size, PARTS, BLOCK, TAPS, CHANNELS)
    else:
        first = (pid - blocks) * BLOCK
        _total(bias_part_ptr, bias_ptr, first, bias_count, columns, PARTS, BLOCK, 1, 1)


def sum_parts(
    parts: Tensor, bias_parts: Tensor | None, out: Tensor | None = None, *, turned: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Add up the parts of a weight's gradient, and of a bias's if there are any.

    Args:
        parts: dense float32 ``[P, M, taps, C]``.
        bias_parts: ``[Q, columns]``, likewise, or None.
        out: dense float32 room for the weight's sum; None for new memory.
        turned: whether the sum is stored as ``[M, C, taps]``.

    Returns:
        `out`, or ``[M, taps, C]`` where it is None; and ``[columns]`` or None.
    """
    if out is None:
        if bias_parts is None and len(parts) == 1:
            return parts[0], None
        out = torch.empty(parts.shape[1:], dtype=parts.dtype, device=parts.device)
    bias, bias_count, columns = None, 0, 0
    if bias_parts is not None:
        bias_count, columns = bias_parts.shape
        bias = torch.empty(columns, dtype=parts.dtype, device=parts.device)
    tile, options = _FEW if len(parts) <= _MOST_FEW else _MANY
    programs = cdiv(out.numel(), tile["BLOCK"]) + cdiv(columns, tile["BLOCK"])
    launch(
        *(_sum_parts_kernel, (programs,), parts, out),
        *(parts if bias_parts is None else bias_parts, out if bias is None else bias),
        *(len(parts), out.numel(), bias_count, columns),
        **tile,
        **_order(*(parts.shape[2:] if turned else (1, 1))),
        **options,
    )
    return out, bias


def _order(taps: int, channels: int) -> dict[str, int]:
    return {"TAPS": taps, "CHANNELS": channels}


def configurations() -> Iterator[Configuration]:
    """Few parts and many: of sizes that are a multiple of 16, of others, and stored turned."""
    types = {f"{name}_ptr": "*fp32" for name in ("part", "out", "bias_part", "bias")}
    kinds = ("", (), (1, 1)), ("odd", ("size",), (1, 1)), ("turned", (), (16, 3))
    for parts, (kind, odd, order) in itertools.product(("few", "many"), kinds):
        tile, options = _FEW if parts == "few" else _MANY
        label, constexprs = f"{parts} {kind}".strip(), tile | _order(*order)
        yield Configuration(_sum_parts_kernel, label, types, constexprs, **options, odd=odd)
