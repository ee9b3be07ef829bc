"""What both halves of `gram_tail` share: tiles, what they accept and compile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._contract import GRAM_TAIL_MAX_CHANNELS, GRAM_TAIL_MAX_M, reads_result, tangents_like
from ._launch import DeviceLimits, cdiv, check_dtypes, pointer
from ._stack_geometry import Front
from ._tiles import tuned
from .activations import EXAMPLES, front_constexprs

# A cell's share of Z: four outputs of four channels, those beyond the layer's own zeros.
COLUMNS = 16
# What may be another size, and the least: a program holds all tangents, and walks along rows.
_BLOCKS = {"tile_x": 1, "block_c": 8}


@triton.jit
def at_weight(ci, co, tap, CO: tl.constexpr, LAST: tl.constexpr):
    """Where a weight [C, CO, 4, 4] lies; with LAST, channels-last in memory."""
    return ci * (16 * CO) + (tap * CO + co if LAST else co * 16 + tap)


@dataclass(frozen=True)
class Tile:
    """What a program takes at a time, and how it is launched.

    Attributes:
        block_m: tangents, of which it holds all.
        tile_y: rows of positions; the backward's are in a line.
        tile_x: positions of a row.
        block_c: channels.
        num_warps: of a program.
        num_stages: of its software pipeline.
        programs: that an SM holds, by registers and shared memory.
        maxnreg: as in `Configuration`.
        by_l1: whether the forward copies T by 8 bytes, through L1, or by 16, past it; where it is
            aligned so.
    """

    block_m: int
    tile_y: int
    tile_x: int
    block_c: int
    num_warps: int
    num_stages: int
    programs: int
    maxnreg: int | None = None
    by_l1: bool = True

    def count(self, height: int, width: int) -> int:
        """Tiles of an image."""
        return cdiv(height, self.tile_y) * cdiv(width, self.tile_x)

    @property
    def options(self) -> dict:
        """What a launch is given besides arguments and constexprs."""
        return {n: getattr(self, n) for n in ("num_warps", "num_stages", "maxnreg")}


def tuned_tile(
    kernel: str,
    tile: Tile,
    m: int,
    dtype: torch.dtype,
    constexprs: Mapping[str, Any],
    limits: DeviceLimits,
    **given: Any,
) -> Tile:
    """The tile as it is, or the one that was measured for this launch, where a device has such.

    Args:
        kernel: the launch's name.
        tile: as it was chosen.
        m: tangents.
        dtype: of T.
        constexprs: as `prepare` gives them.
        limits: of the device.
        given: what else the launch depends on.
    """
    product = constexprs["PRECISION"] if dtype == torch.float32 else "half"
    sizes = {name: constexprs[name] for name in ("H", "W", "C", "CO")}
    others = {"kind": constexprs["KIND"], "sloped": constexprs["SLOPED"]}
    return tuned(
        *(kernel, tile, limits, _BLOCKS),
        **{"dtype": dtype, "product": product, "m": m, **sizes, **others},
        **{"round": constexprs["ROUND_T"], **given},
    )


def block_of(m: int) -> int:
    """The bucket of m tangents."""
    return max(16, triton.next_power_of_2(m))


def backward_tile(
    m: int, channels: int, dtype: torch.dtype, precision: str, plain: bool, limits: DeviceLimits
) -> Tile:
    """For m tangents of that many channels; registers bound it.

    Args:
        m: tangents.
        channels: of T; block by block where registers do not hold all.
        dtype: of T.
        precision: of its float32 products.
        plain: whether there is no activation around the layer that is not applied to T already.
        limits: of the device.
    """
    block_m, exact = block_of(m), dtype == torch.float32
    block_c = 32 if channels % 32 == 0 else 16
    if exact and precision == "ieee":
        positions, warps = 1, 8
        if block_m == 64:
            # Without alignment each element of a row has an address.
            block_c, warps = 8 if channels % 16 else 16, 16
        return Tile(block_m, 1, positions, block_c, warps, 1, 16 // warps, 2048 // warps)
    if exact and precision == "tf32x3":
        block_c = 16 if block_m == 32 and channels > 32 else block_c
        return Tile(block_m, 1, 1, block_c, 8, 1, 1, 255)
    if exact:
        block_c = min(block_c, 16 if block_m == 64 else 32)
    positions = {16: 2, 32: 1, 64: 1}[block_m] if exact else {16: 4, 32: 2, 64: 1}[block_m]
    # Eight warps would have four numbers of T a thread, which halves are narrow loads of.
    narrow = not exact and channels % 32 == 16
    warps, stages = 4 if plain and block_m < 64 or narrow else 8, 2
    # TF32 on sm_90 would be copied number by number.
    if channels % 16 or exact and (block_m < 64 or limits.capability // 10 == 9):
        stages = 1
    if exact and not plain and limits.capability // 10 == 9 and channels % 32 == 0:
        # Around activations copies are wide; without one Triton 3.9's code spills.
        stages = 3
    if plain and block_m == 16 and dtype == torch.bfloat16:
        return Tile(block_m, 1, 2, block_c, warps, stages, 4, 128)
    return Tile(block_m, 1, positions, block_c, warps, stages, 8 // warps, 255)


def shares(parts: int, others: int, tile: Tile, limits: DeviceLimits) -> int:
    """Into how many shares `parts` pieces of work are cut.

    Args:
        parts: pieces.
        others: programs that each share has.
        tile: of a program.
        limits: of the device, whose SMs then hold all programs at once if others allow.
    """
    return min(parts, max(1, tile.programs * limits.sm_count // others))


class Prepared(NamedTuple):
    """Dense tensors in the kernels' order, and the constexprs that both halves have."""

    T: Tensor
    a: Tensor | None
    weight: Tensor
    r: Tensor
    slope: Tensor | None
    constexprs: dict[str, Any]


def prepare(
    T: Tensor,
    weight: Tensor,
    r: Tensor,
    a: Tensor | None,
    kind: str,
    params: Sequence[float],
    applied: bool,
    rounded: bool,
    slope: Tensor | None,
    input_precision: str,
) -> Prepared:
    """Check a launcher's arguments and lay them out.

    Raises:
        TypeError, ValueError: as `gram_tail_partials` says.
    """
    given = {"T": T, "weight": weight, "r": r, "a": a, "slope": slope}
    check_dtypes(**{name: t for name, t in given.items() if t is not None})
    m, B, channels_in, height, width = T.shape if T.dim() == 5 else (0,) * 5
    image = (B, weight.shape[1], 2 * height, 2 * width)
    fits = (
        1 <= m <= GRAM_TAIL_MAX_M
        and weight.shape == (channels_in, weight.shape[1], 4, 4)
        and weight.shape[1] <= GRAM_TAIL_MAX_CHANNELS
        and r.shape == image
        and (slope is None or slope.shape == image)
        and (a is None) == (kind == "none")
        and (a is None or a.shape == T.shape[1:])
        and (not applied or reads_result(kind, params))
    )
    if not fits:
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in given.items() if t is not None)
        raise ValueError(
            f"{shapes}, kind={kind!r}, applied={applied} do not fit: give "
            f"T [m <= {GRAM_TAIL_MAX_M}, B, Ci, H, W], "
            f"weight [Ci, Co <= {GRAM_TAIL_MAX_CHANNELS}, 4, 4], r and slope [B, Co, 2H, 2W], and "
            "a [B, Ci, H, W] with a kind, whose result tells its slope where it is applied"
        )
    if not weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.contiguous()
    return Prepared(
        tangents_like(T, torch.channels_last),
        None if a is None else _channels_last(a.to(T.dtype)),
        weight,
        _channels_last(r.to(torch.float32)),
        None if slope is None else _channels_last(slope.to(torch.float32)),
        {
            **front_constexprs(kind, params),
            **_sizes(height, width, channels_in, weight.shape[1]),
            "LAST": not weight.is_contiguous(),
            "SLOPED": slope is not None,
            "PRECISION": input_precision if T.dtype == torch.float32 else "ieee",
            "ROUND_T": _rounding(kind, input_precision, applied, rounded, T.dtype),
        },
    )


def _rounding(kind: str, precision: str, applied: bool, rounded: bool, dtype: torch.dtype) -> str:
    """To what T is rounded between load and product."""
    front = Front(kind, (), precision, applied, rounded=rounded)
    return front.rounds(dtype == torch.float32)[0]


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _sizes(height: int, width: int, channels_in: int, channels_out: int) -> dict[str, int]:
    return {"H": height, "W": width, "C": channels_in, "CO": channels_out}


class Variant(NamedTuple):
    """One compilation of a kernel, as `variants` gives it; `odd` names what is not aligned."""

    label: str
    m: int
    channels: int
    dtype: torch.dtype
    constexprs: dict[str, Any]
    applied: bool
    odd: bool


# float16 differs from bfloat16 in the instructions' names, and where the backward mixes tangents.
PRODUCTS = (
    (torch.bfloat16, "ieee"),
    *((torch.float32, precision) for precision in ("tf32", "tf32x3", "ieee")),
)
# Channels, whether the activation is applied, its kind, whether there is a slope, odd sizes: what
# is compiled most, each block of channels, the least and the most that a program has to do.
CASES = (
    (32, True, "relu", False, False),
    (32, False, "none", False, False),
    (64, False, "tanh", True, False),
    (16, False, "relu", False, False),
    (17, False, "tanh", False, True),
)


def variants(cases: Sequence[tuple] = CASES, products: Sequence = PRODUCTS) -> Iterator[Variant]:
    """Every compilation of a kernel: of celeba16's last layer, and of an image of 7 x 5."""
    for m, (dtype, precision), case in product((16, 32, 64), products, cases):
        channels, applied, kind, sloped, odd = case
        exact = f" {precision}" if dtype == torch.float32 else ""
        words = [f"m={m} Ci={channels} {pointer(dtype)[1:]}{exact} {kind}"]
        words += ["applied"] * applied + ["sloped"] * sloped + ["odd"] * odd
        # The layer in front may multiply otherwise, and not round what it has applied.
        for known in (True, False) if applied and precision == "tf32" else (applied,):
            constexprs = {
                **front_constexprs(kind, EXAMPLES.get(kind, ())),
                **_sizes(*((7, 5) if odd else (32, 32)), channels, 3),
                **{"LAST": True, "SLOPED": sloped, "PRECISION": precision},
                "ROUND_T": _rounding(kind, precision, applied, known, dtype),
            }
            label = " ".join(words + ["rounding"] * (applied and not known))
            yield Variant(label, m, channels, dtype, constexprs, applied, odd)
