"""What machine instructions do to the integers and predicates of `_warp`.

Each function carries out one family: its modifiers are what stands behind the first dot, its
operands are as printed. What a function does not know it leaves unknown.
"""

from __future__ import annotations

import contextlib
import math
import re
import struct
from collections.abc import Callable, Sequence

from ._warp import COMPARE, CONSTANT, INDEXED, MASK, PREDICATE, Number, Warp, signed


def step(warp: Warp, acts: bool | None, opcode: str, operands: Sequence[str]) -> None:
    """Carry out one instruction that is no branch.

    Args:
        warp: what is known of a thread; changed in place.
        acts: whether the instruction's predicate holds, None where that is unknown.
        opcode: with its modifiers.
        operands: as printed.
    """
    if acts is False or not operands:
        return
    base, *modifiers = opcode.split(".")
    plain = base[1:] if base[:1] == "U" and base[1:] in _SEMANTICS else base
    handler = _SEMANTICS.get(plain)
    if acts is None and plain == "LOP3":
        # What it would change is no longer known; the other bits are.
        result, written, *_ = warp.split(list(operands))
        old, known_before = warp.bits(result)
        handler(warp, set(modifiers), list(operands))
        new, known = warp.bits(result)
        warp.set_bits(result, old, known & known_before & ~(old ^ new))
        for text in written:
            warp.set_predicate(text, None)
        return
    if acts is None or handler is None:
        _forget(warp, operands, _words(base, modifiers))
        return
    handler(warp, set(modifiers), list(operands))


def _forget(warp: Warp, operands: Sequence[str], words: int) -> None:
    """Make unknown what an instruction writes: its first registers, and predicates ahead."""
    for text in operands:
        if PREDICATE.match(text):
            warp.set_predicate(text, None)
            continue
        warp.set(text, None, words)
        return


def _words(base: str, modifiers: Sequence[str]) -> int:
    """Registers that an instruction of no known meaning writes."""
    if base.endswith("MMA") or "128" in modifiers or "4" in modifiers:
        return 4
    pair = base.startswith("D") or modifiers and modifiers[0] in ("64", "U64", "WIDE", "2")
    return 2 if pair or "64" in modifiers or "2" in modifiers or "U64" in modifiers else 1


def _move(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    wide = "64" in modifiers
    warp.set(operands[0], warp.number(operands[1], wide), 2 if wide else 1)


def _halves(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    # How a constant is written where the integer units are busy: -0 * 0 + (high, low).
    value: Number = None
    if operands[1:3] == ["-RZ", "RZ"]:
        with contextlib.suppress(ValueError):
            halves = struct.pack("<2e", float(operands[4]), float(operands[3]))
            value = int.from_bytes(halves, "little")
    warp.set(operands[0], value)


def _load_constant(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    words = 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    at = None
    if found := CONSTANT.match(operands[1]):
        at = int(found[2], 16)
    elif found := INDEXED.match(operands[1]):
        index = warp.number(found[1])
        at = None if index is None else (index + int(found[2] or "0", 16)) & MASK
    value = None if at is None else warp.constant(at, 4 * words)
    if modifiers & {"U8", "S8", "U16", "S16"}:
        value = None
    warp.set(operands[0], value, words)


def _special_register(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    pair = operands[1] == "SRZ" and "32" not in modifiers
    warp.set(operands[0], warp.special.get(operands[1]), 2 if pair else 1)


def _add(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    wide = "64" in modifiers
    bits, signs = 64 if wide else 32, "-" if "X" not in modifiers else ""
    if "X" in modifiers:
        # Minus is a complement there: the one that a borrow adds is the carry.
        operands = [re.sub(r"^-(?=U?R|c)", "~", text) for text in operands]
    inputs = [text for text in operands[1:] if not PREDICATE.match(text)]

    def of(*values: int) -> int:
        # Minus zero carries as well.
        pairs = zip(inputs, values, strict=True)
        return sum(v or (1 << bits if t.startswith(signs or "?") else 0) for t, v in pairs)

    pairs = range(3) if wide else ()
    warp.arithmetic(operands, of, bits // 32, pairs, carries="X" in modifiers)


def _multiply(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    unsigned = "U32" in modifiers

    def of(a: int, b: int) -> int:
        return a * b if unsigned else signed(a) * signed(b)

    if "WIDE" in modifiers:
        warp.arithmetic(operands, lambda a, b, c: of(a, b) + c, words=2, wide=(2,))
    elif "HI" in modifiers:
        # The third input is a pair.
        warp.arithmetic(operands, lambda a, b, c: (of(a, b) + c) >> 32, wide=(2,))
    else:
        carries = "X" in modifiers
        warp.arithmetic(operands, lambda a, b, c: a * b + c, carries=carries)


def _shifted_add(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    if "HI" not in modifiers:
        warp.arithmetic(operands, lambda a, b, s: (a << s & MASK) + b)
    elif "SX32" in modifiers:

        def high(a: int, b: int, s: int) -> int:
            return (signed(a) >> 32 - s & MASK) + b

        warp.arithmetic(operands, high, carries="X" in modifiers)
    else:

        def high_of_pair(a: int, b: int, c: int, s: int) -> int:
            return (((c << 32 | a) << s) >> 32 & MASK) + b

        warp.arithmetic(operands, high_of_pair, carries="X" in modifiers)


def _shift(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    def of(a: int, s: int, c: int) -> int:
        pair = c << 32 | a
        if "L" in modifiers:
            pair = pair << s if "U64" in modifiers or "HI" in modifiers else a << s
        elif modifiers & {"S32", "S64"}:
            pair = signed(pair, 64) >> s
        else:
            pair >>= s
        return (pair >> 32 if "HI" in modifiers else pair) & MASK

    warp.arithmetic(operands, of)


def _logic(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    result, written, inputs, _ = warp.split(operands)
    table = warp.number(inputs[3])
    pairs = [warp.bits(text) for text in inputs[:3]]
    # Bits that may be one, and that may be zero, in each input and then in the result: predicates
    # that found no register are kept as bits of one, of which some are known and some not.
    may = [(~known | value, ~known | ~value) for value, known in pairs]
    ones = zeros = 0
    for index in range(8):
        here = MASK
        for at, (one, zero) in enumerate(may):
            here &= one if index & 4 >> at else zero
        if table is None or table >> index & 1:
            ones |= here
        if table is None or not table >> index & 1:
            zeros |= here
    warp.set_bits(result, ones, ones ^ zeros)
    for text in written:
        warp.set_predicate(text, True if ones & ~zeros else None if ones else False)


def _predicate_logic(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    values = [warp.predicate(text) for text in operands[2:5]]
    for text, table in zip(operands[:2], operands[5:7], strict=False):
        known = None not in values
        index = sum(bool(v) << 2 - at for at, v in enumerate(values))
        warp.set_predicate(text, bool(int(table, 16) >> index & 1) if known else None)


def _vote(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    # No kernel votes: the compiler does, to give the uniform registers a predicate that is equal in
    # all threads of a warp.
    moves = "ANY" in modifiers and len(operands) == 2
    warp.set_predicate(operands[0], warp.predicate(operands[1]) if moves else None)


def _compare(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    first, second, *inputs = operands
    wide = bool(modifiers & {"U64", "S64"})
    a, b = warp.number(inputs[0], wide), warp.number(inputs[1], wide)
    also, low = (warp.predicate(text) for text in (*inputs[2:4], "", "")[:2])
    relation = next(m for m in modifiers if m in COMPARE)
    value: bool | None = None
    if a is not None and b is not None:
        if not modifiers & {"U32", "U64"}:
            bits = 64 if wide else 32
            a, b = signed(a, bits), signed(b, bits)
        # The upper halves of two pairs decide, or else what was found of the lower ones.
        value = low if "EX" in modifiers and a == b else COMPARE[relation](a, b)
    # One of the two may be enough.
    decides = "OR" in modifiers
    if decides in (value, also):
        joined: bool | None = decides
    else:
        joined = None if None in (value, also) else not decides
    warp.set_predicate(first, joined if "XOR" not in modifiers else None)
    warp.set_predicate(second, None)


def _pack(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    # Predicates become bits of a byte of a register, and in `_unpack` again what they were.
    byte = next((8 * int(m[1]) for m in modifiers if m[0] == "B"), 0)
    before, mask = warp.number(operands[2]), warp.number(operands[3])
    bits = {at: warp.predicates.get(f"P{at}") for at in range(7) if (mask or 0) >> at & 1}
    value: Number = None
    if before is not None and None not in bits.values():
        value = before & ~((mask or 0) << byte)
        value |= sum(1 << at + byte for at, bit in bits.items() if bit)
    warp.set(operands[0], value)


def _unpack(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    byte = next((8 * int(m[1]) for m in modifiers if m[0] == "B"), 0)
    value, mask = warp.number(operands[1]), warp.number(operands[2])
    for at in range(7):
        if (mask or 0) >> at & 1:
            warp.predicates[f"P{at}"] = None if value is None else bool(value >> at + byte & 1)


def _select(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    wide = "64" in modifiers
    first = warp.predicate(operands[3])
    a, b = (warp.number(text, wide) for text in operands[1:3])
    value = a if first else b if first is False else None
    warp.set(operands[0], value, 2 if wide else 1)


def _extremum(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    a, b = (warp.number(text) for text in operands[1:3])
    least = warp.predicate(operands[3])
    value: Number = None
    if a is not None and b is not None and least is not None:
        key = (lambda v: v) if "U32" in modifiers else signed
        value = (min if least else max)(a, b, key=key)
    warp.set(operands[0], value)


def _extremum_of_sum(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    total, *others = (warp.number(text) for text in operands[1:4])
    total = None if None in (total, others[0]) else total + others[0] & MASK
    least, (bound,) = warp.predicate(operands[4]), others[1:]
    value: Number = None
    if None not in (total, bound, least):
        key = (lambda v: v) if "U32" in modifiers else signed
        value = (min if least else max)(total, bound, key=key)
    warp.set(operands[0], value)


def _absolute(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    warp.arithmetic(operands, lambda a: abs(signed(a)) & MASK)


def _extend(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    def of(a: int, bits: int) -> int:
        a &= (1 << bits) - 1
        return a if "U32" in modifiers else signed(a, bits) & MASK

    warp.arithmetic(operands, of)


def _permute(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    def of(a: int, selector: int, c: int) -> int:
        source = (c << 32 | a).to_bytes(8, "little")
        picked = [source[selector >> 4 * at & 7] for at in range(4)]
        signs = [selector >> 4 * at & 8 for at in range(4)]
        # With the high bit the byte's sign is repeated.
        fill = [(255 if p & 128 else 0) if s else p for p, s in zip(picked, signs, strict=True)]
        return int.from_bytes(bytes(fill), "little")

    warp.arithmetic(operands, of)


# A division by an unknown size goes through an approximate reciprocal and is then corrected.


def _to_float(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    wide = bool(modifiers & {"U64", "S64"})
    a = warp.number(operands[1], wide)
    if a is None:
        return warp.set(operands[0], None)
    value = a if modifiers & {"U32", "U64"} else signed(a, 64 if wide else 32)
    bits = _float_bits(float(value))
    if "RP" in modifiers and _float_of(bits) < value:
        bits += 1
    return warp.set(operands[0], bits)


def _function(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    a = warp.number(operands[1])
    found = None
    if a is not None and "RCP" in modifiers and "64H" not in modifiers:
        value = _float_of(a)
        found = _float_bits(1 / value) if value and math.isfinite(value) else None
    warp.set(operands[0], found)


def _to_integer(warp: Warp, modifiers: set[str], operands: list[str]) -> None:
    words = 2 if modifiers & {"U64", "S64"} else 1
    a = warp.number(operands[1])
    value = None if a is None or "TRUNC" not in modifiers else _float_of(a)
    known = value is not None and math.isfinite(value)
    warp.set(operands[0], int(value) & (1 << 32 * words) - 1 if known else None, words)


def _float_bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def _float_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


_SEMANTICS: dict[str, Callable[[Warp, set[str], list[str]], None]] = {
    **dict.fromkeys(("MOV", "R2UR"), _move),
    "HFMA2": _halves,
    **dict.fromkeys(("LDC", "LDCU"), _load_constant),
    **dict.fromkeys(("S2R", "S2UR", "CS2R", "CS2UR"), _special_register),
    **dict.fromkeys(("IADD", "IADD3", "VIADD"), _add),
    **{"IMAD": _multiply, "LEA": _shifted_add, "SHF": _shift},
    **{"LOP3": _logic, "PLOP3": _predicate_logic, "ISETP": _compare, "VOTEU": _vote},
    **{"SEL": _select, "IABS": _absolute, "SGXT": _extend, "PRMT": _permute},
    **dict.fromkeys(("IMNMX", "VIMNMX"), _extremum),
    **{"P2R": _pack, "R2P": _unpack},
    "VIADDMNMX": _extremum_of_sum,
    **{"I2F": _to_float, "MUFU": _function, "F2I": _to_integer},
}
