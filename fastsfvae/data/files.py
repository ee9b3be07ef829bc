"""Folders of image files: any folder, CelebA and the rendered chairs. Needs Pillow to decode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_TEST_EVERY = 10
_BATCH = 256


def list_folder(folder: Path, split: str) -> list[Path]:
    """Images below `folder`: those of its ``train``/``test`` folders, else every tenth to test."""
    if any((folder / name).is_dir() for name in ("train", "test")):
        return _images(folder / split)
    return _every_tenth(_images(folder), split)


def list_celeba(folder: Path, split: str) -> list[Path]:
    """CelebA's aligned images, split by ``list_eval_partition.txt`` where it is there.

    `folder` holds ``img_align_celeba`` or torchvision's ``celeba`` around it, or is it. Training
    takes partition 0, testing partition 2.
    """
    for base in (folder, folder / "celeba", folder.parent):
        if (base / "img_align_celeba").is_dir():
            break
    else:
        raise FileNotFoundError(
            f"{folder} has no folder img_align_celeba: unpack img_align_celeba.zip there "
            "(mmlab.ie.cuhk.edu.hk/projects/CelebA.html, 1.4 GB)"
        )
    images = base / "img_align_celeba"
    partition = base / "list_eval_partition.txt"
    if not partition.is_file():
        return _every_tenth(_images(images), split)
    wanted = {"train": "0", "test": "2"}[split]
    rows = [line.split() for line in partition.read_text().splitlines() if line.strip()]
    if any(len(row) != 2 for row in rows):
        raise ValueError(f"{partition} is damaged: each line is a file name and a partition")
    return [images / name for name, part in rows if part == wanted]


def list_chairs(folder: Path, split: str) -> list[Path]:
    """``rendered_chairs/<id>/renders/*.png``; every tenth chair, with all its views, to test."""
    root = folder if folder.name == "rendered_chairs" else folder / "rendered_chairs"
    chairs = sorted(path for path in root.glob("*/renders") if path.is_dir())
    if not chairs:
        raise FileNotFoundError(
            f"{root} has no <id>/renders: unpack rendered_chairs.tar there "
            "(di.ens.fr/willow/research/seeing3Dchairs; 1,393 chairs of 62 views)"
        )
    views = [sorted(chair.glob("*.png")) for chair in chairs]
    for chair, paths in zip(chairs, views, strict=True):
        # An archive that was unpacked in part.
        if len(paths) != len(views[0]):
            raise ValueError(
                f"{chair} has {len(paths)} views, {chairs[0]} has {len(views[0])}: unpack again"
            )
    return [path for paths in _every_tenth(views, split) for path in paths]


def decode_files(paths: list[Path], channels: int, size: int, crop: int) -> Iterator[np.ndarray]:
    """Yield uint8 ``[b, channels, size, size]``: the centre square, resized by area-aware bicubic.

    Args:
        paths: image files.
        channels: 1 (grey) or 3 (RGB); transparency is laid on white.
        size: side of the result in pixels.
        crop: side of the centre square in the file's pixels; 0 takes the largest.

    Raises:
        RuntimeError: without Pillow.
        ValueError: for a file that is damaged or smaller than `crop`, in one line that names it.
    """
    try:
        import PIL.Image  # noqa: F401 - the decoder of each file below
    except ImportError as error:
        raise RuntimeError('decoding images needs Pillow: pip install "fastsfvae[data]"') from error
    for start in range(0, len(paths), _BATCH):
        batch = [_decode(path, channels, size, crop) for path in paths[start : start + _BATCH]]
        yield np.stack(batch)


def _decode(path: Path, channels: int, size: int, crop: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGBA" if file.has_transparency_data else "RGB")
    # Pillow raises SyntaxError and others of its own for broken files.
    except Exception as error:
        raise ValueError(f"{path} cannot be decoded ({error}): replace or remove it") from error
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    side = crop or min(image.size)
    if side > min(image.size):
        width, height = image.size
        raise ValueError(f"{path} is {width}x{height}, smaller than crop={crop}: lower --crop")
    left, top = ((extent - side) // 2 for extent in image.size)
    box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)


def _every_tenth(items: list[T], split: str) -> list[T]:
    test = split == "test"
    return [item for index, item in enumerate(items) if (index % _TEST_EVERY == 9) == test]
