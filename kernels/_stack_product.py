"""Launcher of `_implicit_gemm`'s product, and all configurations of a layer for the audit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from ._contract import PARAMETERS
from ._implicit_gemm import tangent_product_kernel
from ._launch import Configuration, cdiv, pointer
from ._stack_geometry import POINTWISE, Front, Gather, Geometry
from ._stack_tile import Tile, bucket, is_curved
from ._stack_weight import weight_configuration
from .activations import EXAMPLES, front_constexprs


def _product_tile_of(
    channels: int, columns: int, dtype: torch.dtype, precision: str, kind: str, pull: bool
) -> Tile:
    is_full, curved = dtype == torch.float32, is_curved(kind)
    exact = is_full and precision == "ieee"
    block_k = 16 if exact else 128 // dtype.itemsize
    across_taps = channels % block_k > 0
    if across_taps:
        block_k = max(16, block_k // 2)
    # A curved kind has more to hold, three TF32 products split both operands, and a block that
    # crosses taps has an address a lane.
    three = is_full and precision == "tf32x3"
    crowded = curved or across_taps or three
    # Without a bound of its own the assembler spills a few bytes of some curved kinds for the sake
    # of more programs an SM.
    registers = 255 if curved else None
    if exact and curved and not pull:
        # Between 192, which spills on sm_90, and 224, which spills on sm_120.
        registers = 208
    return Tile(
        block_m=64,
        # The sum over tangents is a second accumulator.
        block_n=min(bucket(columns), 32 if curved and (three or pull and is_full) else 64),
        block_k=block_k,
        num_warps=8 if crowded and not exact else 4,
        num_stages=2 if exact else 3,
        maxnreg=registers,
    )


def _product_constexprs(
    gather: Gather,
    channels: int,
    columns: int,
    dtype: torch.dtype,
    precision: str,
    kind: dict,
    pull: bool,
    has_bias: bool,
) -> dict:
    tile = _product_tile_of(channels, columns, dtype, precision, kind["KIND"], pull)
    geometry = {name.upper(): value for name, value in asdict(gather).items()}
    return {
        **geometry,
        **kind,
        "PULL": pull,
        "CURVED": pull and is_curved(kind["KIND"]),
        "HAS_BIAS": has_bias,
        **{"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
        "ONE_TAP": channels % tile.block_k == 0,
        "PRECISION": precision,
    }


def product(
    stack: Tensor,
    weight: Tensor,
    gather: Gather,
    out_size: tuple[int, int],
    front: Front,
    *,
    inner_is_input: bool,
    bias: Tensor | None = None,
    pull: Tensor | None = None,
) -> Tensor:
    """Apply a layer, or its transpose, to a stack.

    Args:
        stack: dense ``[S, B, H, W, C]``, slot 0 the values; a supported dtype, also the weight's.
        weight: dense ``[outer, taps, inner]``; one of outer and inner is C, the other N.
        gather: the product's geometry.
        out_size: ``(OH, OW)``.
        front: of the layer.
        inner_is_input: whether inner is C.
        bias: added to slot 0's columns, repeated where it is shorter than N.
        pull: dense ``[S, B, OH, OW, N]``: the stack that the activation was applied to. Then
            `stack` is a gradient, and its product is pulled back through the activation.

    Returns:
        ``[S, B, OH, OW, N]`` in the stack's dtype.
    """
    (S, B, H, W, C), (OH, OW), (outer, taps, inner) = stack.shape, out_size, weight.shape
    N = outer if inner_is_input else inner
    # Of the input's channel and the output's.
    strides = (1, taps * inner) if inner_is_input else (taps * inner, 1)
    out = torch.empty((S, B, OH, OW, N), dtype=stack.dtype, device=stack.device)
    kind, params, precision, *_ = front
    constexprs = _product_constexprs(
        *(gather, C, N, stack.dtype, precision, front_constexprs(kind, params)),
        pull=pull is not None and kind != "none",
        has_bias=bias is not None,
    )
    tile = _product_tile_of(C, N, stack.dtype, precision, kind, constexprs["PULL"])
    grid_h, grid_w = cdiv(OH, gather.phases), cdiv(OW, gather.phases)
    slots = S if constexprs["CURVED"] else 1
    rows = S // slots * B * grid_h * grid_w
    programs = cdiv(rows, tile.block_m) * gather.phases**2 * cdiv(N, tile.block_n)
    with torch.cuda.device_of(stack):
        tangent_product_kernel[(programs,)](
            *(stack, weight, stack if bias is None else bias),
            *(stack if pull is None else pull, out, rows, slots, B, grid_h, grid_w, H, W, C),
            *(OH, OW, N, N if bias is None else bias.numel(), *strides, inner),
            **constexprs,
            **tile.launch,
        )
    return out


_PRODUCTS = (
    *((torch.float32, precision) for precision in ("tf32", "tf32x3", "ieee")),
    (torch.bfloat16, "tf32"),
)
# (dtype, precision, kind, channels, columns): what any operation compiles most of,
TYPICAL = tuple(
    (*product, kind, 64, 64)
    for product in _PRODUCTS
    for kind in ("relu", "tanh")
    if product[1] != "ieee"
)
# every kind, every dtype and product with each sort of activation and with odd channels, and narrow
# tiles. float16 differs from bfloat16 in the instructions' names alone.
EVERY = (
    *(
        (*product, kind, 64, 64)
        for product in _PRODUCTS
        for kind in ("none", *PARAMETERS)
        if (*product, kind, 64, 64) not in TYPICAL
    ),
    *itertools.product((torch.float16,), ("tf32",), ("none", "relu", "tanh"), (64,), (64,)),
    *(
        (*product, "relu", *sizes)
        for product in _PRODUCTS
        if product[1] != "ieee"
        for sizes in ((3, 16), (3, 32), (3, 64), (48, 64))
    ),
    *TYPICAL,
)


def audited(
    name: str,
    geometry: Geometry,
    variants: Sequence[tuple[torch.dtype, str, str, int, int]] = TYPICAL,
) -> Iterator[Configuration]:
    """What one operation's launchers compile, for the audit.

    Args:
        name: for the table.
        geometry: of the layer.
        variants: `TYPICAL` or `EVERY`; they differ in what does not depend on the geometry.
    """
    forward, backward, inner_is_input = geometry
    for dtype, precision, kind, channels, columns in variants:
        label = f"{name} {kind} C={channels} N={columns} {pointer(dtype)[1:]}"
        label += f" {precision}" if dtype == torch.float32 else ""
        types = {f"{pointer_name}_ptr": pointer(dtype) for pointer_name in "x w bias a y".split()}
        sizes = ("C", "stride_w_tap", "stride_w_n", "stride_w_c") if channels % 16 else ()
        constexprs = front_constexprs(kind, EXAMPLES.get(kind, ()))
        for gather, pull in ((forward, False), (backward, True)):
            options = _product_constexprs(
                *(gather, channels, columns, dtype, precision, constexprs),
                pull=pull and kind != "none",
                has_bias=not pull,
            )
            tile = _product_tile_of(channels, columns, dtype, precision, kind, options["PULL"])
            # The JIT makes a constant of an argument that is 1.
            one = "stride_w_c" if inner_is_input != pull else "stride_w_n"
            yield Configuration(
                tangent_product_kernel,
                f"{label} {'back' if pull else 'forward'}",
                types,
                {**options, one: 1},
                odd=tuple(size for size in sizes if size != one),
                **tile.launch,
            )
        reads, plain, windowed = backward, channels, columns
        if inner_is_input:
            reads, plain, windowed = forward, columns, channels
        # A window around each of 16 x 16 positions; without one each position is an image.
        extent = 1 if reads == POINTWISE else 16
        yield weight_configuration(
            *(label, reads, (extent, extent), plain),
            (reads.stride * extent, reads.stride * extent, windowed),
            *(dtype, Front(kind, EXAMPLES.get(kind, ()), precision), inner_is_input),
        )
