"""Launcher of a layer's product on a stack, and all configurations of a layer for the audit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._contract import PARAMETERS, reads_result, room_for, samples_apart
from ._doubling_gemm import tangent_doubling_kernel
from ._implicit_gemm import tangent_product_kernel
from ._launch import Configuration, DeviceLimits, cdiv, device_limits, launch, pointer
from ._narrow_gemm import tangent_narrow_kernel
from ._product_tile import NARROW, Sizes, doubling_tile, narrow_tile, product_tile
from ._stack_geometry import POINTWISE, Front, Gather, Geometry
from ._stack_tile import Tile, is_curved
from ._stack_weight import weight_configuration
from ._tiles import tuned, tunes
from .activations import EXAMPLES, front_constexprs

# What may be another size, and the least; the narrow kernel's columns are its own.
_BLOCKS = {
    "narrow": {"block_m": 16, "block_k": 16},
    **dict.fromkeys(("doubling", "product"), {"block_m": 16, "block_n": 16, "block_k": 16}),
}


class Plan(NamedTuple):
    """How a product is launched.

    Attributes:
        by: "narrow", "doubling" or "product", of `tangent_<by>_kernel`.
        constexprs: of the kernel.
        tile: block sizes.
    """

    by: str
    constexprs: dict[str, Any]
    tile: Tile

    @property
    def kernel(self) -> Any:
        """The `triton.jit` function."""
        return {
            "narrow": tangent_narrow_kernel,
            "doubling": tangent_doubling_kernel,
            "product": tangent_product_kernel,
        }[self.by]

    @property
    def programs_a_block(self) -> int:
        """Programs for each block of rows."""
        parities = {"narrow": 1, "doubling": 2}.get(self.by) or self.constexprs["PHASES"] ** 2
        return parities * cdiv(self.constexprs["N"], self.tile.block_n)


def plan(
    gather: Gather,
    sizes: Sizes,
    dtype: torch.dtype,
    front: Front,
    limits: DeviceLimits,
    *,
    inner_is_input: bool,
    pull: bool,
    bias_size: int = 0,
    data: str = "none",
    aligned: bool = True,
    apart: bool = False,
) -> Plan:
    """Choose kernel and blocks.

    Args:
        gather: the product's geometry.
        sizes: of a slot of one sample.
        dtype: of the stack.
        front: of the layer.
        limits: of the device.
        inner_is_input: as in `product`, like `pull`.
        pull: whether the result is pulled back.
        bias_size: numbers of the bias, 0 without one.
        data: where the channels of the data lie that the values are taken from, "first" or "last".
        aligned: whether stack and weight start at a multiple of 16.
        apart: whether slots of a stack lie further apart than its samples need.

    Raises:
        ValueError: an activation that cannot be applied where it is; data and another kernel than
            the narrow one; a tile, measured or tried, that the kernel cannot take.
    """
    in_front, behind = (front.kind, front.params), (front.behind, front.behind_params)
    for kind, params in (*([in_front] if front.applied else []), behind):
        if kind != "none" and not reads_result(kind, params):
            raise ValueError(f"{kind!r} does not tell its slope by its result: apply it in front")
    on_load, result = (("none", ()), in_front) if pull else (front.on_load, behind)
    curved = pull and is_curved(result[0])
    is_full, by = dtype == torch.float32, "product"
    on_x = front.rounds(is_full)[pull]
    if gather.phases == 2 and not curved and not is_curved(on_load[0]):
        whole = sizes.OH == 2 * sizes.H and sizes.OW == 2 * sizes.W and gather.kernel == 4
        plain = on_load[0] == "none" and not pull
        by = "narrow" if whole and plain and sizes.N <= NARROW else "doubling"
    if data != "none" and by != "narrow":
        raise ValueError(f"data for a {by} kernel: only the narrow one subtracts")
    capability = limits.capability
    if by == "narrow":
        tile = narrow_tile(sizes, dtype, front.precision, capability)
    elif by == "doubling":
        kinds = on_load[0], "none" if pull else result[0]
        given = sizes, dtype, front.precision, kinds, on_x != "none", capability
        tile = doubling_tile(*given)
    else:
        tile = product_tile(
            *(gather, sizes, dtype, front.precision, (on_load[0], result[0])),
            *(on_x != "none", capability),
        )
    if tunes(limits):
        of_narrow = {"data": data}
        of_all = {**asdict(gather), "pull": pull, "on_load": on_load[0], "aligned": aligned}
        tile = tuned(
            *(f"tangent_{by}", tile, limits, _BLOCKS[by]),
            **{"dtype": dtype, "product": front.precision if is_full else "half"},
            **{**sizes._asdict(), "result": result[0], "round": on_x},
            **(of_narrow if by == "narrow" else of_all),
            **({"inner_is_input": inner_is_input} if by == "product" else {}),
        )
    result_kind, R0, R1 = front_constexprs(*result).values()
    rounds = is_full and (pull or result_kind != "none")
    constexprs = {
        **{name: getattr(sizes, name) for name in "HWCN"},
        **{"RESULT_KIND": result_kind, "R0": R0, "R1": R1},
        **{"HAS_BIAS": bias_size > 0, "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k},
        **{"UNIT": _unit(gather, sizes, tile.block_m), "APART": apart},
        **{"PRECISION": front.precision, "ROUND": front.precision if rounds else "none"},
        "ROUND_X": on_x,
    }
    if by == "narrow":
        constexprs["DATA"] = data
    else:
        wide = all(n * dtype.itemsize % 16 == 0 for n in (sizes.C, sizes.N))
        constexprs["BY_L1"] = tile.by_l1 and aligned and gather.taps > 1 and wide
        constexprs |= {"GRID_H": cdiv(sizes.OH, gather.phases), **front_constexprs(*on_load)}
        constexprs |= {"GRID_W": cdiv(sizes.OW, gather.phases), "OH": sizes.OH, "OW": sizes.OW}
        constexprs |= {"PULL": pull, "KERNEL": gather.kernel, "BLOCK_N": tile.block_n}
    if by == "product":
        taken = {name.upper(): value for name, value in asdict(gather).items()}
        inside = all(_inside(gather, *axis) for axis in ((sizes.H, sizes.OH), (sizes.W, sizes.OW)))
        constexprs |= taken | {"INNER_IS_INPUT": inner_is_input, "CURVED": curved}
        constexprs |= {"BIAS_SIZE": bias_size or sizes.N, "INSIDE": inside}
    return Plan(by, constexprs, tile)


def _unit(gather: Gather, sizes: Sizes, block_m: int) -> int:
    """Neighbouring positions of one slot in a block of rows.

    Few, so that the block's slots share what tells their slopes, but for windows, which overlap.
    """
    positions = cdiv(sizes.OH, gather.phases) * cdiv(sizes.OW, gather.phases)
    most = block_m if gather.phases == 1 and gather.taps > 1 or sizes.N <= NARROW else 32
    return min(most, block_m, 2 ** (positions.bit_length() - 1))


def _inside(gather: Gather, extent: int, out: int) -> bool:
    """Whether no output along an axis has a tap outside of the input."""
    grid, reach = cdiv(out, gather.phases), gather.step * (gather.taps - 1)
    last = gather.stride * (grid - 1) + gather.offset + gather.phases - 1
    return gather.offset + min(reach, 0) >= 0 and last + max(reach, 0) < extent


def _channels(data: Tensor) -> str:
    return "last" if data.is_contiguous(memory_format=torch.channels_last) else "first"


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
    data: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Apply a layer, or its transpose, to a stack.

    Args:
        stack: ``[S, B, H, W, C]``, slot 0 the values; a supported dtype, also the weight's. As
            `pull` and `out` it is dense, or some samples of a dense stack (`samples_apart`).
        weight: dense ``[outer, taps, inner]``; one of outer and inner is C, the other N.
        gather: the product's geometry.
        out_size: ``(OH, OW)``.
        front: of the layer.
        inner_is_input: whether inner is C.
        bias: added to slot 0's columns, repeated where it is shorter than N.
        pull: ``[S, B, OH, OW, N]``: the layer's input, in front of its activation or behind it.
            Then `stack` is a gradient, and its product is pulled back through the activation.
        data: ``[B, N, OH, OW]``, dense in either memory order: the result is data - values. For
            a stack of values, and a layer that `tangent_narrow_kernel` takes.
        out: where the result goes, in the stack's dtype or in float32; None for new memory.

    Returns:
        ``[S, B, OH, OW, N]`` in the stack's dtype or, where it is given, `out`.

    Raises:
        ValueError: an `out` of another shape, dtype or order; data for another kernel.
    """
    (S, B, H, W, C), (outer, _, inner) = stack.shape, weight.shape
    sizes = Sizes(H, W, C, *out_size, outer if inner_is_input else inner)
    bias = None if bias is None else bias.contiguous()
    out = room_for(out, (S, B, *out_size, sizes.N), stack)
    apart = [samples_apart(t) for t in (stack, out if pull is None else pull, out)]
    chosen = plan(
        *(gather, sizes, stack.dtype, front, device_limits(stack)),
        inner_is_input=inner_is_input,
        pull=pull is not None,
        bias_size=0 if bias is None else bias.numel(),
        data="none" if data is None else _channels(data),
        aligned=(stack.data_ptr() | weight.data_ptr()) % 16 == 0,
        apart=apart != [B] * 3,
    )
    tile, unit = chosen.tile, chosen.constexprs["UNIT"]
    runs = cdiv(B * prod(cdiv(extent, gather.phases) for extent in out_size), unit)
    if chosen.by != "product":
        # Of what tells slopes they read the values alone.
        del apart[1]
    all_slots = (S,) if chosen.by == "product" else ()
    spans = [(0, S)]
    if pull is None and front.behind != "none":
        # The tangents' slope is read off the values that lie behind the activation.
        spans = [(0, 1), (1, S - 1)]
    elif chosen.constexprs.get("CURVED"):
        spans = [(0, 1)]
    read = next((t for t in (pull, data) if t is not None), out)
    for first, slots in spans:
        if slots:
            launch(
                chosen.kernel,
                (cdiv(runs * slots, tile.block_m // unit) * chosen.programs_a_block,),
                *(stack, weight, stack if bias is None else bias, read),
                *(out, first, slots, *all_slots, B, *apart),
                **chosen.constexprs,
                **tile.launch,
            )
    return out


# (dtype, product) of what the audit compiles; float16 differs from bfloat16 in names alone.
PRODUCTS = (
    *((torch.float32, precision) for precision in ("tf32", "tf32x3", "ieee")),
    (torch.bfloat16, "tf32"),
)
# (dtype, precision, kind, channels, columns): what any operation compiles most of,
TYPICAL = tuple(
    (*product, kind, 64, 64)
    for product in PRODUCTS
    for kind in ("relu", "tanh")
    if product[1] != "ieee"
)
# every kind, every dtype and product with each sort of activation and with odd channels, and narrow
# tiles. float16 differs from bfloat16 in the instructions' names alone.
EVERY = (
    *(
        (*product, kind, 64, 64)
        for product in PRODUCTS
        for kind in ("none", *PARAMETERS)
        if (*product, kind, 64, 64) not in TYPICAL
    ),
    *itertools.product((torch.float16,), ("tf32",), ("none", "relu", "tanh"), (64,), (64,)),
    *(
        (*product, "relu", *sizes)
        for product in PRODUCTS
        if product[1] != "ieee"
        for sizes in ((3, 16), (3, 32), (3, 64), (48, 64))
    ),
    *TYPICAL,
)


def audited(
    name: str,
    geometry: Geometry,
    variants: Sequence[tuple[torch.dtype, str, str, int, int]] = TYPICAL,
    size: int = 16,
    out_dtype: torch.dtype | None = None,
    apart: bool = False,
    data: Sequence[str] = (),
) -> Iterator[Configuration]:
    """What one operation's launchers compile on the device at hand, for the audit.

    Args:
        name: for the table.
        geometry: of the layer.
        variants: `TYPICAL` or `EVERY`; they differ in what does not depend on the geometry.
        size: rows and columns of the layer's input; 1 where its positions are images.
        out_dtype: of the forward's results, where it is not the stack's.
        apart: whether stacks are some samples of larger ones.
        data: orders of data that the forward's values are subtracted from besides, as `plan` has.
    """
    forward, backward, inner_is_input = geometry
    limits = device_limits(torch.empty(0))
    size = 1 if forward == POINTWISE else size
    out = size * forward.phases // forward.stride
    for (dtype, precision, kind, channels, columns), known in itertools.product(
        variants, (True, False)
    ):
        label = f"{name} {kind} C={channels} N={columns} {pointer(dtype)[1:]}"
        label += f" {precision}" if dtype == torch.float32 else ""
        types = {f"{pointer_name}_ptr": pointer(dtype) for pointer_name in "x w a y".split()}
        types["bias_ptr"] = "*fp32"
        params = EXAMPLES.get(kind, ())
        applied = (True, kind, params) if reads_result(kind, params) else ()
        front = Front(kind, params, precision, *applied)
        if known:
            # An activation on load is compiled with all that may be rounded, once.
            on_load = front.on_load[0] != "none"
            front = front._replace(rounded=True, grad_rounded=not on_load)
        elif front.on_load[0] != "none" or front.rounds(dtype == torch.float32)[0] == "none":
            continue
        else:
            label += " rounding"
        into, from_ = (size, size, channels), (out, out, columns)
        subtracted = ((forward, False, order) for order in data)
        for gather, pull, order in (
            (forward, False, "none"),
            (backward, True, "none"),
            *subtracted,
        ):
            chosen = plan(
                *(gather, Sizes(*from_, *into) if pull else Sizes(*into, *from_), dtype, front),
                limits,
                inner_is_input=inner_is_input != pull,
                pull=pull,
                bias_size=0 if pull else columns,
                apart=apart,
                data=order,
            )
            # A forward without a gradient reads slopes where it writes.
            written = (
                {} if out_dtype is None else dict.fromkeys(("a_ptr", "y_ptr"), pointer(out_dtype))
            )
            yield Configuration(
                chosen.kernel,
                f"{label} {'back' if pull else 'forward' if order == 'none' else 'residual'}",
                types if pull else types | written,
                chosen.constexprs,
                **chosen.tile.launch,
            )
        reads, plain, windowed = backward, (size, size, channels), (out, out, columns)
        if inner_is_input:
            reads, plain, windowed = forward, windowed, plain
        yield weight_configuration(
            *(label, reads, plain[:2], plain[2], windowed, dtype, front, inner_is_input, columns),
            apart=apart,
        )
