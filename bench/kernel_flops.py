"""Useful FLOPs of this library's kernels: a product's multiply-adds, padding left out.

A kernel that forms no product has None: bytes bound it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Arguments = Mapping[str, Any]


def _product(a: Arguments, taps: int) -> int:
    """Every output of the slots that a launch takes, from so many taps of every channel."""
    outputs = a["rows"] * a["B"] * a["y_ptr"].shape[2] * a["y_ptr"].shape[3] * a["N"]
    return 2 * outputs * a["C"] * taps


def _weight(a: Arguments) -> int:
    return 2 * a["images"] * a["GRID_H"] * a["GRID_W"] * a["M"] * a["KERNEL"] ** 2 * a["C"]


def _tail(a: Arguments) -> tuple[int, int]:
    """Of J's products with the weight, and of one m x m product with J."""
    m, B, H, W, C = a["t_ptr"].shape
    outputs = B * 4 * H * W * a["CO"]
    # Each output has four of the sixteen taps.
    return 2 * m * outputs * C * 4, 2 * m * m * outputs


def _tail_forward(a: Arguments) -> int:
    return sum(_tail(a))


def _tail_backward(a: Arguments) -> int:
    by_weight, by_gram = _tail(a)
    return 2 * by_weight + by_gram


def _gram(a: Arguments) -> int:
    B, m, n = a["j_ptr"].shape
    return 2 * B * m * m * n


_FLOPS: dict[str, Callable[[Arguments], int]] = {
    "tangent_product_kernel": lambda a: _product(a, a["TAPS"] ** 2),
    "tangent_doubling_kernel": lambda a: _product(a, 4),
    "tangent_narrow_kernel": lambda a: _product(a, 4),
    "tangent_weight_kernel": _weight,
    "tangent_back_kernel": lambda a: 64 * a["images"] * a["H"] * a["W"] * a["C"] * a["N"],
    "_gram_tail_fwd_kernel": _tail_forward,
    "_gram_tail_bwd_kernel": _tail_backward,
    "_gram_project_fwd_kernel": _gram,
    "_gram_project_bwd_kernel": _gram,
}


def flops_of(kernel: str, arguments: Arguments) -> int | None:
    """FLOPs of a launch by its arguments; None where it has none, or they are not known."""
    known = _FLOPS.get(kernel)
    return None if known is None or arguments.get("RESCUE") else known(arguments)
