"""Block sizes of a layer's products on a stack, by what was counted in their machine code."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._launch import NEWER
from ._stack_geometry import Gather
from ._stack_tile import Tile, bucket, is_curved


class Sizes(NamedTuple):
    """Of one slot of one sample, in and out of a product."""

    H: int
    W: int
    C: int
    OH: int
    OW: int
    N: int


# Channels out that leave no column of `tangent_narrow_kernel` too many.
NARROW = 4


def _block_k(channels: int, most: int) -> int:
    """Channels a step: as many as divide them, so that a step has one tap and needs no mask."""
    while most > 16 and channels % most:
        most //= 2
    return most


def narrow_tile(sizes: Sizes, dtype: torch.dtype, precision: str, capability: int) -> Tile:
    simple, registers = dtype != torch.float32 or precision == "tf32", None
    odd = sizes.C % 16 > 0
    if dtype != torch.float32:
        registers = 168 if capability >= 100 else None
    elif precision == "ieee" and not odd:
        registers = 128
    # Beside the masks of odd channels programs of 64 rows would spill a few bytes.
    few = odd and dtype == torch.float32 and precision == "ieee"
    return Tile(
        block_m=128 if simple and not odd else 32 if few else 64,
        block_n=16,
        # 64 bytes of a position.
        block_k=_block_k(sizes.C, 64 // dtype.itemsize),
        num_warps=2 if few else 4,
        # All loads of a step are on their way together, and wider than copies through L1.
        num_stages=1,
        # Left to itself the assembler spills a few bytes for the sake of more programs: of half
        # precision on sm_120, of plain products on sm_80.
        maxnreg=registers,
    )


def doubling_tile(
    sizes: Sizes,
    dtype: torch.dtype,
    precision: str,
    kinds: tuple[str, str],
    rounds: bool,
    capability: int,
) -> Tile:
    is_full = dtype == torch.float32
    exact, three = (is_full and precision == of for of in ("ieee", "tf32x3"))
    # Two accumulators, and with an activation in front two tiles for each of the stack's three.
    (kind, behind), hopper = kinds, capability // 10 == 9
    small = kind != "none" or exact or three
    # Of a slope that takes a product behind the loop a newer compiler would spill parts.
    light = is_full or behind != "leaky_relu" or not NEWER.value
    if hopper and light and not small and sizes.C % 32 == 0:
        # Two warp groups share a copy of the weight: L2 is what would bound fewer rows. Thin steps,
        # so that in half precision two programs find registers.
        return Tile(
            block_m=256,
            block_n=min(bucket(sizes.N), 32),
            block_k=_block_k(sizes.C, 16),
            num_warps=8,
            num_stages=2 if is_full else 3,
            maxnreg=None if is_full else 128,
        )
    odd = sizes.C % 16 > 0
    return Tile(
        block_m=(32 if three and odd else 64) if small else 128,
        block_n=min(bucket(sizes.N), 32),
        # 64 bytes of a position.
        block_k=_block_k(sizes.C, 64 // dtype.itemsize),
        # A warp group of Hopper's multiplies 64 rows at once, whatever it has to do besides.
        num_warps=4 if (small or hopper) and not (three or exact) else 8,
        # A Hopper SM has room for two buffers and a second program, others for one.
        num_stages=3 if hopper and not exact else 2,
        # Left to itself the assembler spills a few bytes, for the sake of another program.
        maxnreg=128 if exact and kind == "none" else 255 if odd or rounds else None,
    )


def product_tile(
    gather: Gather,
    sizes: Sizes,
    dtype: torch.dtype,
    precision: str,
    kinds: tuple[str, str],
    rounds: bool,
    capability: int,
) -> Tile:
    is_full, (on_load, behind) = dtype == torch.float32, kinds
    exact, three = (is_full and precision == of for of in ("ieee", "tf32x3"))
    curved = is_curved(on_load) or is_curved(behind)
    block_k = _block_k(sizes.C, 16 if exact else 128 // dtype.itemsize)
    across_taps = sizes.C % block_k > 0
    # A curved kind has more to hold, three TF32 products split both operands, and a block that
    # crosses taps has an address a lane.
    crowded = curved or across_taps or three
    # The sum over tangents is a second accumulator.
    block_n = min(bucket(sizes.N), 32 if is_curved(behind) or curved and three else 64)
    # Fewer rows where there are few of them or much to hold, and else the fewest reads of the
    # weight.
    hopper, holds = capability // 10 == 9, crowded or exact or on_load != "none"
    few = sizes.OH * sizes.OW <= 16 or (is_full and block_n == 64 and not hopper)
    block_m = 64 if holds or few else 128
    if hopper and not holds and (gather.taps > 1 or sizes.N >= 1024):
        # Else L2 bounds it, of which each block of rows asks for the whole weight.
        block_m = 128 if few else 256
    wide = block_m * block_n * dtype.itemsize > 128 * 32 * 2 and block_m == 128 and not hopper
    # Without a bound of its own the assembler spills a few bytes for the sake of more programs an
    # SM: on sm_120 of plain products too.
    registers = 255 if is_curved(on_load) or rounds and capability >= 100 else None
    if capability >= 100 and few and not (holds or is_full):
        registers = 136
    if three and block_n < 64 and not curved:
        registers = 128
    alone = exact and is_curved(on_load)
    if alone:
        # Steps that overlap would spill a few bytes, whatever the bound: four programs an SM do.
        registers = 128
    return Tile(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        num_warps=8 if crowded and not exact or wide or block_m == 256 else 4,
        num_stages=1 if alone else 2 if exact else 3,
        maxnreg=registers,
    )
