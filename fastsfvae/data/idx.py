"""MNIST and Fashion-MNIST: idx files of the same names, told apart by what is in them."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastsfvae.data.download import missing

_MAGIC, _LABELS_MAGIC = 2051, 2049
_PREFIX = {"train": "train", "test": "t10k"}
# SHA-256 of the published files of images, unpacked.
_PUBLISHED = {
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db": ("mnist", "train"),
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7": ("mnist", "test"),
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888": ("fashion-mnist", "train"),
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b": ("fashion-mnist", "test"),
}


class Idx(NamedTuple):
    """A set of idx files.

    Attributes:
        name: one of `fastsfvae.data.load.DATA_SETS`.
        title: as people write it.
        torchvision: torchvision's folder of it.
    """

    name: str
    title: str
    torchvision: str

    def find(self, folder: Path, split: str) -> Path:
        """The file of a split's images, plain or gzipped.

        Raises:
            FileNotFoundError: where there is none, in one line that says what is expected.
        """
        return self._find(folder, f"{_PREFIX[split]}-images-idx3-ubyte")

    def labels(self, folder: Path, split: str) -> np.ndarray:
        """The labels of a split's images, int64 ``[N]``, from the file beside theirs.

        Raises:
            FileNotFoundError, ValueError: for a file that is missing, damaged or something else.
        """
        path = self._find(folder, f"{_PREFIX[split]}-labels-idx1-ubyte")
        content = self._unpack(path)
        magic, count = struct.unpack_from(">2i", content) if len(content) >= 8 else (0, 0)
        labels = np.frombuffer(content, np.uint8, offset=min(8, len(content)))
        if magic != _LABELS_MAGIC or count != labels.size or not count:
            raise ValueError(
                f"{path} is damaged, or no file of {self.title} labels: fetch it again"
            )
        return labels.astype(np.int64)

    def _find(self, folder: Path, name: str) -> Path:
        for layout in ("", "raw", f"{self.torchvision}/raw"):
            for suffix in ("", ".gz"):
                if (path := folder / layout / f"{name}{suffix}").is_file():
                    return path
        where = f"itself or in {self.torchvision}/raw"
        raise missing(self.name, f"{folder} has no {name}.gz, {where}")

    def read(self, path: Path, split: str) -> tuple[np.ndarray, list[str]]:
        """Read what `find` gave for the split.

        Returns:
            uint8 ``[N, 1, H, W]``, and a note where this is not the published file.

        Raises:
            ValueError: for a file that is damaged or something else, be it the same file of another
                set or split, in one line that names it.
        """
        content = self._unpack(path)
        try:
            magic, count, height, width = struct.unpack_from(">4i", content)
        except struct.error as error:
            raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
        if magic != _MAGIC:
            raise ValueError(
                f"{path} is not a file of {self.title} images (magic {magic}, not {_MAGIC})"
            )
        pixels = np.frombuffer(content, np.uint8, offset=16)
        if min(count, height, width) < 1 or pixels.size != count * height * width:
            raise ValueError(
                f"{path} announces {count} images of {height}x{width} but holds {pixels.size} "
                "bytes of pixels: fetch it again"
            )
        return pixels.reshape(count, 1, height, width), self._notes(path, split, content, count)

    @staticmethod
    def _unpack(path: Path) -> bytes:
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rb") as file:
                return file.read()
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged ({error}): fetch it again") from error

    def _notes(self, path: Path, split: str, content: bytes, count: int) -> list[str]:
        found = _PUBLISHED.get(hashlib.sha256(content).hexdigest())
        if found is None:
            return [
                f"{path.name} is not the published file of {self.title}: its {count:,} images are "
                "taken as they are"
            ]
        if found != (self.name, split):
            name, part = found
            todo = "put the right file there"
            if name != self.name:
                todo = f"give --data {name}, or {todo}"
            raise ValueError(
                f"{path} holds the {part} images of {name}, not the {split} images of "
                f"{self.name}: {todo}"
            )
        return []


MNIST = Idx("mnist", "MNIST", "MNIST")
FASHION_MNIST = Idx("fashion-mnist", "Fashion-MNIST", "FashionMNIST")
