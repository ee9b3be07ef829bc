"""Block sizes of the programs that work on stacks."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from ._contract import PIECEWISE_LINEAR


@dataclass(frozen=True)
class Tile:
    """Block sizes and launch options of one program.

    Attributes:
        block_m: rows.
        block_n: columns.
        block_k: of a step of the sum.
        num_warps: of a program.
        num_stages: of its software pipeline.
        maxnreg: as in `Configuration`.
        by_l1: whether what neighbours read again is copied by 8 bytes, through L1, or by 16, past
            it; where it is aligned so.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    maxnreg: int | None
    by_l1: bool = True

    @property
    def launch(self) -> dict:
        """What a launch is given besides its arguments."""
        return {n: getattr(self, n) for n in ("num_warps", "num_stages", "maxnreg")}


def bucket(size: int) -> int:
    return min(max(16, triton.next_power_of_2(size)), 64)


def is_curved(kind: str) -> bool:
    return kind != "none" and kind not in PIECEWISE_LINEAR
