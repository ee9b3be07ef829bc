"""One way to every data set, by name."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.data import arrays, arrow, cache, digits, files, omniglot, omniglot_parts, shards
from fastsfvae.data.convert import Settings, convert_images
from fastsfvae.data.decode import SUFFIXES
from fastsfvae.data.download import SOURCES, SYSTEM_FOLDERS, download
from fastsfvae.data.idx import FASHION_MNIST, MNIST, Idx
from fastsfvae.data.split import PARTS


class Defaults(NamedTuple):
    """A set's own channels, side and centre crop, in pixels (0: the largest square)."""

    channels: int
    size: int
    crop: int


# 148 of CelebA's 178x218 is the common crop to the face.
DATA_SETS = {
    "digits": Defaults(1, 28, 0),
    "mnist": Defaults(1, 28, 0),
    "fashion-mnist": Defaults(1, 28, 0),
    "omniglot": Defaults(1, 28, 0),
    "omniglot-images": Defaults(1, 28, 0),
    "celeba": Defaults(3, 64, 148),
    "chairs": Defaults(3, 64, 0),
    "folder": Defaults(3, 64, 0),
    "npz": Defaults(1, 28, 0),
    "huggingface": Defaults(3, 64, 0),
    "webdataset": Defaults(3, 64, 0),
}
# Each finds the images of both parts.
_IMAGES = {
    "celeba": files.find_celeba,
    "chairs": files.find_chairs,
    "folder": files.find_folder,
    "omniglot-images": omniglot_parts.find,
    "huggingface": arrow.find,
    "webdataset": shards.find,
}
# Each finds and reads one file of one part.
_PUBLISHED: dict[str, Any] = {"mnist": MNIST, "fashion-mnist": FASHION_MNIST, "omniglot": omniglot}
# Raised where the same files are to become other pixels.
_VERSION = 2

# What was said once is not said again, however often a set is loaded.
_said: set[str] = set()


class Loaded(NamedTuple):
    """A split of a data set.

    Attributes:
        images: uint8 ``[N, C, H, W]``.
        scale: how the stored values became 0..255.
        left_out: images that could not be read, of both splits: a name and the reason each.
    """

    images: Tensor
    scale: str
    left_out: list[tuple[str, str]]


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
        if name in _IMAGES:
            if _IMAGES[name](place).part:
                download(name, place)
        else:
            for split in PARTS:
                _PUBLISHED[name].find(place, split)
    except FileNotFoundError:
        if not folder:
            raise
        download(name, place)


def data_label(name: str, folder: str) -> str:
    """A data set's name as a result is labelled, which says where it is a part of the set.

    Args:
        name: one of `DATA_SETS`.
        folder: where its files lie; read for "omniglot-images" alone.

    Raises:
        FileNotFoundError, ValueError: for drawings that are missing or damaged.
    """
    part = _IMAGES[name](_place(name, folder)).part if name == "omniglot-images" else ""
    return f"{name}, {part}" if part else name


def load_images(name: str, folder: str, split: str, **settings: Any) -> Tensor:
    """The images of `load_set`, whose arguments it takes."""
    return load_set(name, folder, split, **settings).images


def load_labels(name: str, folder: str, split: str) -> Tensor:
    """The labels of the images of `load_set`, int64 ``[N]``.

    Args:
        name: "digits", "mnist" or "fashion-mnist".
        folder: as in `load_set`.
        split: "train" or "test".

    Raises:
        FileNotFoundError, ValueError: for a set without labels, or files that are missing or
            damaged, in one line.
    """
    if name == "digits":
        return digits(split).labels
    if not isinstance(published := _PUBLISHED.get(name), Idx):
        raise ValueError(f"data={name!r} has no labels: take digits, mnist or fashion-mnist")
    return torch.from_numpy(published.labels(_place(name, folder), split))


def load_set(
    name: str,
    folder: str,
    split: str,
    *,
    channels: int,
    size: int,
    crop: int = 0,
    padding: int = 0,
    skip_bad: bool = False,
) -> Loaded:
    """Load a split of a data set, uint8 ``[N, channels, H, W]`` with H = W = size + 2 padding.

    What is not the package's own is converted on first use, both splits at once
    (`fastsfvae.data.cache`). What was not taken, or not plain, is said in a warning, once.

    Args:
        name: one of `DATA_SETS`.
        folder: where the files lie; for "npz" the file; not read for "digits".
        split: "train" or "test".
        channels: 1 or 3.
        size: side in pixels; sets that are not stored as image files have only their own.
        crop: side of the centre square taken of an image file, in its pixels; 0 for the largest.
        padding: black pixels added on each side.
        skip_bad: whether to go on without image files that cannot be read.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: for data that is missing, damaged or of another
            size, in one line that names the file and says what to do.
    """
    if name not in DATA_SETS:
        raise ValueError(f"data={name!r} is not one of {', '.join(map(repr, DATA_SETS))}")
    if split not in PARTS:
        raise ValueError(f"split={split!r} is not one of 'train', 'test'")
    if name == "digits":
        loaded = Loaded(digits(split).images, "uint8", [])
    elif name in _PUBLISHED:
        loaded = _load_published(name, _place(name, folder), split)
    else:
        settings = Settings(channels, size, crop, skip_bad)
        loaded = _load_converted(name, _place(name, folder), split, settings)
    images = loaded.images
    if images.shape[1:] != (channels, size, size):
        given = "x".join(map(str, images.shape[1:]))
        raise ValueError(
            f"data={name!r} has images of {given} (C x H x W), not {channels}x{size}x{size}: "
            "set --channels and --image-size to match"
        )
    return loaded._replace(images=F.pad(images, (padding,) * 4)) if padding else loaded


def _place(name: str, folder: str) -> Path:
    if not folder and name in SYSTEM_FOLDERS:
        return SYSTEM_FOLDERS[name].path
    if not folder:
        raise ValueError(f"data={name!r} is read from disk: say where it lies with --data-dir")
    return Path(folder).expanduser()


def _load_published(name: str, folder: Path, split: str) -> Loaded:
    path = _PUBLISHED[name].find(folder, split)

    def convert() -> cache.Conversion:
        pixels, notes = _PUBLISHED[name].read(path, split)
        facts = {"scale": "uint8", "notes": notes, "left_out": []}
        return cache.Conversion(pixels.shape[1:], len(pixels), [(split, pixels)], facts)

    made_from = cache.fingerprint([path], split, _VERSION)
    opened = cache.open_part(name, (split,), split, made_from, convert)
    return _loaded(opened, folder, split, [])


def _load_converted(name: str, folder: Path, split: str, settings: Settings) -> Loaded:
    skipped: list[str] = []
    if name == "npz":
        paths = [arrays.find(folder)]
        made_from = cache.fingerprint(paths, _VERSION)
        convert = partial(arrays.convert, folder)
    else:
        found = _IMAGES[name](folder)
        if not found.paths:
            raise FileNotFoundError(
                f"{folder} has no {split} images ({', '.join(SUFFIXES)}): give the folder that "
                "they lie in"
            )
        # As it is now: what is not read changes without a new conversion.
        skipped = found.notes
        made_from = cache.fingerprint(found.paths, _VERSION, *settings)
        convert = partial(convert_images, str(folder), found, settings)
    opened = cache.open_part(name, PARTS, split, made_from, convert)
    return _loaded(opened, folder, split, skipped)


def _loaded(opened: cache.Opened, folder: Path, split: str, skipped: list[str]) -> Loaded:
    images, facts = opened
    for note in (*skipped, *facts["notes"]):
        if (text := f"{folder}: {note}") not in _said:
            _said.add(text)
            warnings.warn(text, stacklevel=2)
    if images is None:
        raise FileNotFoundError(
            f"{folder} has no {split} images: name a part of it {split}, or give at least ten, of "
            "which every tenth is for testing"
        )
    left_out = [(str(Path(folder, each)), reason) for each, reason in facts["left_out"]]
    return Loaded(images, facts["scale"], left_out)
