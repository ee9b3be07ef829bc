"""One way to every data set, by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.data import cache, digits, files, mnist, npz, omniglot
from fastsfvae.data.download import SOURCES, download


class Defaults(NamedTuple):
    """A set's own channels, side and centre crop, in pixels (0: the largest square)."""

    channels: int
    size: int
    crop: int


# 148 of CelebA's 178x218 is the common crop to the face.
DATA_SETS = {
    "digits": Defaults(1, 28, 0),
    "mnist": Defaults(1, 28, 0),
    "omniglot": Defaults(1, 28, 0),
    "omniglot-images": Defaults(1, 28, 0),
    "celeba": Defaults(3, 64, 148),
    "chairs": Defaults(3, 64, 0),
    "folder": Defaults(3, 64, 0),
    "npz": Defaults(1, 28, 0),
}
_LISTS = {
    "celeba": files.list_celeba,
    "chairs": files.list_chairs,
    "folder": files.list_folder,
    "omniglot-images": files.list_omniglot,
}
# Each finds and reads one file.
_ARCHIVES = {"mnist": mnist, "omniglot": omniglot, "npz": npz}
_SPLITS = ("train", "test")


def download_images(name: str, folder: str) -> None:
    """Download a data set where it is not there already; nothing is replaced.

    Args:
        name: one of `DATA_SETS`.
        folder: where its files go.

    Raises:
        ValueError, RuntimeError: for a set that is not public, damaged files, or a download that
            failed, in one line.
    """
    if name not in SOURCES:
        raise ValueError(f"data={name!r}: --download is for {', '.join(SOURCES)}")
    place = _place(name, folder)
    try:
        for split in _SPLITS:
            _find(name, place, split)
    except FileNotFoundError:
        download(name, place)


def load_images(
    name: str,
    folder: str,
    split: str,
    *,
    channels: int,
    size: int,
    crop: int = 0,
    padding: int = 0,
) -> Tensor:
    """Load a split of a data set, uint8 ``[N, channels, H, W]`` with H = W = size + 2 padding.

    Files of images are converted on first use (`fastsfvae.data.cache`).

    Args:
        name: one of `DATA_SETS`.
        folder: where the files lie; for "npz" the archive; not read for "digits".
        split: "train" or "test".
        channels: 1 or 3.
        size: side in pixels; sets that are not stored as image files have only their own.
        crop: side of the centre square taken of an image file, in its pixels; 0 for the largest.
        padding: black pixels added on each side.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: for data that is missing, damaged or of another
            size, in one line that names the file and says what to do.
    """
    if name not in DATA_SETS:
        raise ValueError(f"data={name!r} is not one of {', '.join(map(repr, DATA_SETS))}")
    if split not in _SPLITS:
        raise ValueError(f"split={split!r} is not one of 'train', 'test'")
    if name == "digits":
        images = digits(split).images
    else:
        images = _from_disk(name, _place(name, folder), split, channels, size, crop)
    if images.shape[1:] != (channels, size, size):
        given = "x".join(map(str, images.shape[1:]))
        raise ValueError(
            f"data={name!r} has images of {given} (C x H x W), not {channels}x{size}x{size}: "
            "set --channels and --image-size to match"
        )
    return F.pad(images, (padding,) * 4) if padding else images


def _place(name: str, folder: str) -> Path:
    if not folder:
        raise ValueError(f"data={name!r} is read from disk: say where it lies with --data-dir")
    return Path(folder).expanduser()


def _find(name: str, folder: Path, split: str) -> list[Path]:
    """The files that a split is made from."""
    if name in _LISTS:
        return _LISTS[name](folder, split)
    return [_ARCHIVES[name].find(folder, split)]


def _from_disk(name: str, folder: Path, split: str, channels: int, size: int, crop: int) -> Tensor:
    paths = _find(name, folder, split)
    if not paths:
        raise FileNotFoundError(f"{folder} has no {split} images (.png, .jpg, .bmp, .webp)")

    def decode() -> tuple[cache.Shape, Iterable[np.ndarray]]:
        if name in _LISTS:
            shape = (len(paths), channels, size, size)
            return shape, files.decode_files(paths, channels, size, crop)
        pixels = _ARCHIVES[name].read(paths[0], split)
        return pixels.shape, [pixels]

    settings = (channels, size, crop) if name in _LISTS else (split,)
    return cache.open_cached(f"{name}-{split}", cache.fingerprint(paths, *settings), decode)
