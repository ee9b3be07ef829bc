"""Which images are for training and which for testing: none is for both."""

from __future__ import annotations

import hashlib

import numpy as np

from fastsfvae.data.text import counted, some

PARTS = ("train", "test")

_TEST_EVERY = 10
_NAMED = 5


def every_tenth(number: int) -> str:
    """The part of the image of that number where nothing else says it."""
    return "test" if number % _TEST_EVERY == _TEST_EVERY - 1 else "train"


class Split:
    """Places the images of a set one after another.

    Two images of equal pixels are one image. Where every tenth is for testing, a copy goes where
    the first one went. Where the set says which are for testing, these come first, and a copy of
    one of them is left out of training.
    """

    def __init__(self) -> None:
        self._first: dict[bytes, tuple[str, str]] = {}
        self._copies: list[str] = []
        self._left_out: list[str] = []

    def place(self, pixels: np.ndarray, name: str, number: int, part: str | None) -> str | None:
        """The part of the next image; None leaves it out.

        Args:
            pixels: uint8 ``[C, H, W]``, as it is trained on.
            name: as a note calls it.
            number: its place in the set.
            part: the set's own, or None.
        """
        digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest()
        mine = (part or every_tenth(number), name)
        first = self._first.setdefault(digest, mine)
        if first is mine:
            return mine[0]
        leaks = part is not None and first[0] != part
        (self._left_out if leaks else self._copies).append(f"{name} = {first[1]}")
        return None if leaks else first[0]

    def notes(self) -> list[str]:
        """What was found, in one line at most."""
        found = []
        if self._left_out:
            what = counted(len(self._left_out), "training image is", "training images are")
            found.append(
                f"{what} also for testing and left out of training: {some(self._left_out, _NAMED)}"
            )
        if self._copies:
            what = counted(len(self._copies), "image is a copy", "images are copies")
            found.append(
                f"{what} of another, and for training or testing as the other is: "
                f"{some(self._copies, _NAMED)}"
            )
        return ["; ".join(found)] if found else []
