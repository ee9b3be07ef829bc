"""Block sizes of `gram_project`'s kernels, and into how many parts a device cuts n."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ._launch import DeviceLimits, cdiv
from ._tiles import tuned, tunes

# What may be another size, and the least.
_BLOCKS = {"block_m": 16, "block_n": 16}


@dataclass(frozen=True)
class Tile:
    """Block sizes of either kernel; wider where m is smaller, so that a tile keeps its size."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict:
        """What a launch is given besides arguments and constexprs."""
        return {n: getattr(self, n) for n in ("num_warps", "num_stages", "maxnreg")}


def fwd_tile(m: int, n: int, dtype: torch.dtype, precision: str, limits: DeviceLimits) -> Tile:
    """Of the forward of J [B, m, n] of a dtype, float32 products formed by a precision."""
    block_m = min(max(16, triton.next_power_of_2(m)), 64)
    # 8 KiB in flight. Above one tile of rows, two tiles of J share them.
    elements = 8192 // dtype.itemsize // (1 if m <= block_m else 2)
    warps = 8 if block_m == 64 else 4
    tile = Tile(block_m, elements // block_m, num_warps=warps, num_stages=2)
    return _tuned("gram_project_fwd", tile, m, n, dtype, precision, limits)


def bwd_tile(m: int, n: int, dtype: torch.dtype, precision: str, limits: DeviceLimits) -> Tile:
    """Of its pullback."""
    block_m = min(max(16, triton.next_power_of_2(m)), 64)
    # Left to itself the assembler spills a few bytes beside an address for each element.
    registers = 255 if m > 32 and n % 16 and dtype == torch.bfloat16 else None
    tile = Tile(block_m, 2048 // block_m, num_warps=8, num_stages=1, maxnreg=registers)
    return _tuned("gram_project_bwd", tile, m, n, dtype, precision, limits)


def _tuned(
    kernel: str,
    tile: Tile,
    m: int,
    n: int,
    dtype: torch.dtype,
    precision: str,
    limits: DeviceLimits,
) -> Tile:
    if not tunes(limits):
        return tile
    product = precision if dtype == torch.float32 else "half"
    given = {"dtype": dtype, "product": product, "m": m, "n": n}
    return tuned(kernel, tile, limits, _BLOCKS, **given)


def splits(B: int, n: int, pairs: int, block_n: int, limits: DeviceLimits) -> tuple[int, int]:
    """Parts of n and columns per part: about three programs an SM, at least two blocks a part."""
    wanted = max(1, 3 * limits.sm_count // (B * pairs))
    blocks = cdiv(n, block_n)
    blocks_per_split = cdiv(blocks, max(1, min(wanted, blocks // 2)))
    return cdiv(blocks, blocks_per_split), blocks_per_split * block_n
