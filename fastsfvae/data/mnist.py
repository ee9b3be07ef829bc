"""MNIST's idx files, plain or gzipped, in a folder of their own or in torchvision's layout."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from fastsfvae.data.download import missing

_MAGIC = 2051
_PREFIX = {"train": "train", "test": "t10k"}
_LAYOUTS = ("", "raw", "MNIST/raw")


def find(folder: Path, split: str) -> Path:
    """The file of a split's images.

    Raises:
        FileNotFoundError: where there is none, in one line that says what is expected.
    """
    name = f"{_PREFIX[split]}-images-idx3-ubyte"
    for layout in _LAYOUTS:
        for suffix in ("", ".gz"):
            if (path := folder / layout / f"{name}{suffix}").is_file():
                return path
    raise missing("mnist", f"{folder} has no {name}.gz, itself or in MNIST/raw")


def read(path: Path, split: str) -> np.ndarray:
    """Read what `find` gave for the split, uint8 ``[N, 1, H, W]``.

    Raises:
        ValueError: for a file that is damaged or something else, in one line that names it.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
        magic, count, height, width = struct.unpack_from(">4i", content)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
    if magic != _MAGIC:
        raise ValueError(f"{path} is not a file of MNIST images (magic {magic}, not {_MAGIC})")
    pixels = np.frombuffer(content, np.uint8, offset=16)
    if min(count, height, width) < 1 or pixels.size != count * height * width:
        raise ValueError(
            f"{path} announces {count} images of {height}x{width} but holds {pixels.size} bytes "
            "of pixels: fetch it again"
        )
    return pixels.reshape(count, 1, height, width)
