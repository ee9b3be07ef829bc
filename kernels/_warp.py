"""The integers and predicates of one thread, as machine code computes them; the rest is unknown.

What this knows is what loop counters, bounds and masks are made of. An instruction that it does not
know, or one of unknown numbers, leaves its results unknown: never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence

Number = int | None
MASK = 0xFFFFFFFF
# Where a kernel's arguments start in constant memory, by compute capability.
_ARGUMENTS = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210, 120: 0x380}
REGISTER = re.compile(r"^([-~|]*)(U?R)(\d+|Z)\|?(\.64|\.H\d)?$")
CONSTANT = re.compile(r"^([-~|]*)c\[0x0\]\[(0x[0-9a-f]+)\]\|?$")
# As an index tells it.
INDEXED = re.compile(r"^c\[0x0\]\[(U?R\d+)(?:\+(0x[0-9a-f]+))?\]$")
_ADDRESS = re.compile(r"\[(U?R\d+)\.64(?:\+(UR\d+))?\+?(-?0x[0-9a-f]+)?\]$")
PREDICATE = re.compile(r"^(!?)(U?P)(\d|T)$")
COMPARE: dict[str, Callable[[int, int], bool]] = {
    "GE": lambda a, b: a >= b,
    "GT": lambda a, b: a > b,
    "LE": lambda a, b: a <= b,
    "LT": lambda a, b: a < b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def signed(value: int, bits: int = 32) -> int:
    """Two's complement."""
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


class Warp:
    """One thread's registers; unknown where they do not follow from the arguments.

    Args:
        arch: compute capability, 89 for 8.9.
        arguments: of the kernel, as they lie in constant memory.
        program: its number along each axis.
        threads: of a program.
        thread: its number among those.

    Attributes:
        special: numbers that the hardware gives, by name.
        registers: 32 bits each, by name; None where unknown.
        predicates: likewise.
    """

    def __init__(
        self,
        arch: int,
        arguments: bytes,
        program: tuple[int, int, int],
        threads: int,
        thread: int = 0,
    ) -> None:
        self._constants = arguments
        self._start = _ARGUMENTS[arch]
        self._threads = threads
        self.special = {"SR_TID.X": thread, "SR_TID.Y": 0, "SR_TID.Z": 0, "SRZ": 0}
        self.special["SR_LANEID"] = thread % 32
        self.special |= {f"SR_CTAID.{axis}": n for axis, n in zip("XYZ", program, strict=True)}
        self.registers: dict[str, Number] = {}
        # Of those that are unknown: what is known of their bits, and which those are.
        self._bits: dict[str, tuple[int, int]] = {}
        self.predicates: dict[str, bool | None] = {}

    def predicate(self, text: str) -> bool | None:
        """The value of "!P0"; of "", True."""
        if not text:
            return True
        found = PREDICATE.match(text)
        if not found:
            return None
        value = True if found[3] == "T" else self.predicates.get(found[2] + found[3])
        return value if value is None or not found[1] else not value

    def branch(self, acts: bool | None, opcode: str, operands: Sequence[str]) -> bool | None:
        """Whether a branch is taken: it may have a predicate among its operands as well."""
        if "DIV" in opcode:
            # Taken where the threads of a warp part.
            return False
        for text in operands:
            if PREDICATE.match(text):
                also = self.predicate(text)
                acts = None if acts is None or also is None else acts and also
        return acts

    def number(self, text: str, wide: bool = False) -> Number:
        """An operand's 32 bits, or 64 of a pair of registers."""
        if found := REGISTER.match(text):
            if found[3] == "Z":
                value: Number = 0
            else:
                index = int(found[3])
                value = self.registers.get(f"{found[2]}{index}")
                if wide:
                    high = self.registers.get(f"{found[2]}{index + 1}")
                    value = None if value is None or high is None else high << 32 | value
        elif found := CONSTANT.match(text):
            value = self.constant(int(found[2], 16), 8 if wide else 4)
        else:
            try:
                return int(text, 16) & (2**64 - 1 if wide else MASK)
            except ValueError:
                return None
        if value is None:
            return None
        bits = 64 if wide else 32
        if "|" in found[1]:
            value = abs(signed(value, bits))
        if "~" in found[1]:
            value = ~value
        if found[1].startswith("-"):
            value = -value
        return value & ((1 << bits) - 1)

    def address(self, operands: Sequence[str]) -> Number:
        """Where in device memory an access goes."""
        for text in operands:
            if found := _ADDRESS.search(text):
                base = self.number(found[1], wide=True)
                more = self.number(found[2]) if found[2] else 0
                if base is None or more is None:
                    return None
                return base + more + int(found[3] or "0", 16)
        return None

    def constant(self, at: int, size: int) -> Number:
        """What constant memory holds at a byte: an argument, or a program's threads."""
        if at == 0:
            return self._threads
        at -= self._start
        if at < 0 or at + size > len(self._constants):
            return None
        return int.from_bytes(self._constants[at : at + size], "little")

    def set(self, text: str, value: Number, words: int = 1) -> None:
        """Write registers from the named one on."""
        found = REGISTER.match(text)
        if not found or found[3] == "Z":
            return
        for word in range(words):
            name = f"{found[2]}{int(found[3]) + word}"
            self.registers[name] = None if value is None else value >> 32 * word & MASK
            self._bits.pop(name, None)

    def bits(self, text: str) -> tuple[int, int]:
        """What is known of an operand's 32 bits, and which those are."""
        value = self.number(text)
        if value is not None:
            return value, MASK
        found = REGISTER.match(text)
        value, known = self._bits.get(found[2] + found[3], (0, 0)) if found else (0, 0)
        if found and found[1]:
            return (~value & known, known) if found[1] == "~" else (0, 0)
        return value, known

    def set_bits(self, text: str, value: int, known: int) -> None:
        """Write a register of which some bits are known."""
        known &= MASK
        self.set(text, value & MASK if known == MASK else None)
        found = REGISTER.match(text)
        if found and found[3] != "Z" and known != MASK:
            self._bits[found[2] + found[3]] = value & known, known

    def set_predicate(self, text: str, value: bool | None) -> None:
        """Write a predicate."""
        found = PREDICATE.match(text)
        if found and found[3] != "T":
            self.predicates[found[2] + found[3]] = value

    def split(self, operands: list[str]) -> tuple[str, list[str], list[str], list[str]]:
        """Result, predicates written beside it, inputs, and predicates read behind them."""
        written, read = [], []
        # A comparison of bits may write nothing but a predicate, ahead of RZ.
        while PREDICATE.match(operands[0]):
            written.append(operands.pop(0))
        result = operands.pop(0)
        while operands and PREDICATE.match(operands[0]):
            written.append(operands.pop(0))
        while operands and PREDICATE.match(operands[-1]):
            read.insert(0, operands.pop())
        return result, written, operands, read

    def arithmetic(
        self,
        operands: list[str],
        compute: Callable[..., int],
        words: int = 1,
        wide: Container[int] = (),
        carries: bool = False,
    ) -> None:
        """Apply `compute` to the inputs.

        Args:
            operands: all of the instruction's.
            compute: of the inputs' numbers.
            words: registers of the result.
            wide: which inputs are pairs of registers.
            carries: whether the predicates behind the inputs are added.
        """
        result, written, inputs, read = self.split(operands)
        values = [self.number(text, at in wide) for at, text in enumerate(inputs)]
        ins = [self.predicate(text) for text in read]
        known = None not in values and not (carries and None in ins)
        value = compute(*values) + (sum(map(bool, ins)) if carries else 0) if known else None
        bits = 32 * words
        for text in written:
            # A carry out: of sums of numbers below 2^bits.
            self.set_predicate(text, None if value is None else value >> bits > 0)
        self.set(result, None if value is None else value & ((1 << bits) - 1), words)
