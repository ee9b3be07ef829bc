"""Useful FLOPs and bytes of this library's kernels: padding, and what is not read, left out.

A kernel that forms no product has no FLOPs: bytes bound it. A rescue counts as where no sample is
lost: it reads a flag of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.triton_calls import Call

Arguments = Mapping[str, Any]


def _slots(a: Arguments) -> int:
    """Of a launch; where phi'' sums over them, each program goes through all."""
    return a["slots"] if a.get("CURVED") else a["rows"]


def _product(a: Arguments, taps: int) -> int:
    """Every output of the slots that a launch takes, from so many taps of every channel."""
    outputs = _slots(a) * a["B"] * a["y_ptr"].shape[2] * a["y_ptr"].shape[3] * a["N"]
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


_ON_SLOTS = frozenset(f"tangent_{by}_kernel" for by in ("product", "doubling", "narrow"))


def part_of(call: Call) -> list[str]:
    """What tells a launch from one on the same tensors that does another part of the work."""
    a = call.arguments
    if a.get("RESCUE"):
        return ["rescue"]
    if call.kernel in _ON_SLOTS and _slots(a) < len(a["x_ptr"]):
        return ["tangents" if a["first_slot"] else "values"]
    return []


def bytes_of(call: Call) -> float:
    """Bytes that a launch goes through: of each tensor once, of a stack the slots that it takes."""
    a = call.arguments
    if a.get("RESCUE"):
        return a["B"]
    if call.kernel not in _ON_SLOTS:
        return call.moved
    one = 1 / len(a["x_ptr"])
    part = one * _slots(a)
    # What tells the slopes is a stack's first slot.
    on_load = one if a.get("KIND", "none") != "none" and a["first_slot"] else 0.0
    sloped = a["RESULT_KIND"] != "none" and (a.get("PULL") or a["first_slot"])
    whole = a.get("CURVED") or a.get("DATA", "none") != "none"
    shares = {"x_ptr": part + on_load, "y_ptr": part, "a_ptr": 1.0 if whole else one * bool(sloped)}
    shares["bias_ptr"] = float(a["HAS_BIAS"] and not a["first_slot"])
    found: dict[int, tuple[int, float]] = {}
    for name, tensor in call.tensors.items():
        _, share = found.get(tensor.data_ptr(), (0, 0.0))
        size = tensor.numel() * tensor.element_size()
        found[tensor.data_ptr()] = size, min(1.0, share + shares.get(name, 1.0))
    return sum(size * share for size, share in found.values())
