"""Any .npz archive of uint8 images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_TEST_EVERY = 10
_SHAPES = "give [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels"


def find(path: Path, split: str) -> Path:
    """The archive of both splits itself.

    Raises:
        FileNotFoundError: where there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: give the .npz archive as --data-dir")
    return path


def read(path: Path, split: str) -> np.ndarray:
    """Read ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` as uint8 ``[N, C, H, W]``.

    The arrays ``train`` and ``test``, or one array ``images`` whose every tenth is for testing.

    Raises:
        ValueError: for an archive or array that is something else, in one line that names it.
    """
    try:
        with np.load(path) as archive:
            names = archive.files
            name = split if {"train", "test"} & set(names) else "images"
            images = archive[name] if name in names else None
    # A damaged archive raises errors of many classes, down to MemoryError.
    except Exception as error:
        raise ValueError(f"{path} is damaged or not an .npz archive ({error})") from error
    if images is None:
        raise ValueError(f"{path} holds {names}: name the arrays train and test, or one images")
    if images.ndim < 3 or not images.size:
        raise ValueError(f"{path}: array {name} is {images.shape}: {_SHAPES}")
    if name == "images":
        test = np.arange(len(images)) % _TEST_EVERY == _TEST_EVERY - 1
        images = images[test if split == "test" else ~test]
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: array {name} is {images.dtype}: store images as uint8, 0 to 255")
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images.transpose(0, 3, 1, 2)
    raise ValueError(f"{path}: array {name} is {images.shape}: {_SHAPES}")
