"""One way to every data set, by name."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fastsfvae.data import cache, digits, files, mnist, npz, omniglot


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
    "celeba": Defaults(3, 64, 148),
    "chairs": Defaults(3, 64, 0),
    "folder": Defaults(3, 64, 0),
    "npz": Defaults(1, 28, 0),
}
_LISTS = {
    "celeba": files.list_celeba,
    "chairs": files.list_chairs,
    "folder": files.list_folder,
}


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
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is not one of 'train', 'test'")
    if name == "digits":
        images = digits(split).images
    else:
        if not folder:
            raise ValueError(f"data={name!r} lies where you put it: give its place by --data-dir")
        images = _from_disk(name, Path(folder), split, channels, size, crop)
    if images.shape[1:] != (channels, size, size):
        given = "x".join(map(str, images.shape[1:]))
        raise ValueError(
            f"data={name!r} has images of {given} (C x H x W), not {channels}x{size}x{size}: "
            "set --channels and --image-size to match"
        )
    return F.pad(images, (padding,) * 4) if padding else images


def _from_disk(name: str, folder: Path, split: str, channels: int, size: int, crop: int) -> Tensor:
    if name not in _LISTS:
        if name == "mnist":
            path = mnist.find_idx(folder, split)
            pixels = mnist.read_idx(path)
        elif name == "omniglot":
            path = omniglot.find_mat(folder)
            pixels = omniglot.read_mat(path, split)
        else:
            path, pixels = folder, npz.read_npz(folder, split)
        made_from = cache.fingerprint([path], split)
        return cache.open_cached(f"{name}-{split}", made_from, pixels.shape, [pixels])
    paths = _LISTS[name](folder, split)
    if not paths:
        raise FileNotFoundError(f"{folder} has no {split} images (.png, .jpg, .bmp, .webp)")
    made_from = cache.fingerprint(paths, channels, size, crop)
    shape = (len(paths), channels, size, size)
    decoded = files.decode_files(paths, channels, size, crop)
    return cache.open_cached(f"{name}-{split}", made_from, shape, decoded)
