"""What a convolution is besides its weight."""

from __future__ import annotations

from typing import NamedTuple


class Geometry(NamedTuple):
    """Of a convolution or its transpose; one entry per spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]
