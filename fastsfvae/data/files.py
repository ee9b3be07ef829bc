"""Folders of image files: any, CelebA, the rendered chairs, Omniglot. Needs Pillow to decode."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from fastsfvae.data.download import missing

T = TypeVar("T")

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_TEST_EVERY = 10
_CHAIRS, _VIEWS = 1_393, 62
_OMNIGLOT = {"train": ("images_background", 19_280), "test": ("images_evaluation", 13_180)}
_BATCH = 256


def list_folder(folder: Path, split: str) -> list[Path]:
    """Images below `folder`: those of its ``train``/``test`` folders, else every tenth to test."""
    if any((folder / name).is_dir() for name in ("train", "test")):
        return _images(folder / split)
    return _every_tenth(_images(folder), split)


def list_celeba(folder: Path, split: str) -> list[Path]:
    """CelebA's aligned images, split by ``list_eval_partition.txt`` where that is beside them.

    `folder` holds ``img_align_celeba`` or torchvision's ``celeba`` around it, or the .jpg files
    themselves. Training takes partition 0, testing partition 2; without partitions every tenth
    image is for testing.
    """
    for base in (folder / "img_align_celeba", folder / "celeba" / "img_align_celeba", folder):
        if images := sorted(base.glob("*.jpg")):
            break
    else:
        raise missing("celeba", f"{folder} has no folder img_align_celeba and no .jpg files")
    partition = base.parent / "list_eval_partition.txt"
    if not partition.is_file():
        return _every_tenth(images, split)
    wanted = {"train": "0", "test": "2"}[split]
    text = partition.read_text(errors="replace")
    rows = [line.split() for line in text.splitlines() if line.strip()]
    if any(len(row) != 2 for row in rows):
        raise ValueError(f"{partition} is damaged: each line is a file name and a partition")
    if sorted(name for name, _ in rows) != [path.name for path in images]:
        raise ValueError(
            f"{base} has {len(images)} images, {partition} lists {len(rows)} or others: unpack "
            "img_align_celeba.zip again"
        )
    return [base / name for name, part in rows if part == wanted]


def list_chairs(folder: Path, split: str) -> list[Path]:
    """``rendered_chairs/<id>/renders/*.png``; every tenth chair, with all its views, to test."""
    root = folder if folder.name == "rendered_chairs" else folder / "rendered_chairs"
    chairs = sorted(path for path in root.glob("*/renders") if path.is_dir())
    if not chairs:
        raise missing("chairs", f"{root} has no <id>/renders")
    views = [sorted(chair.glob("*.png")) for chair in chairs]
    for chair, paths in zip(chairs, views, strict=True):
        _check_count(chair, len(paths), _VIEWS, "views")
    _check_count(root, len(chairs), _CHAIRS, "chairs")
    return [path for paths in _every_tenth(views, split) for path in paths]


def list_omniglot(folder: Path, split: str) -> list[Path]:
    """Omniglot's drawings; its background alphabets to train, its evaluation alphabets to test.

    `folder` holds ``images_background`` and ``images_evaluation``, or torchvision's ``omniglot-py``
    around them.
    """
    name, count = _OMNIGLOT[split]
    for root in (folder / name, folder / "omniglot-py" / name):
        if root.is_dir():
            paths = _images(root)
            _check_count(root, len(paths), count, "drawings")
            return paths
    raise missing("omniglot-images", f"{folder} has no folder {name}, itself or in omniglot-py")


def _check_count(folder: Path, count: int, published: int, what: str) -> None:
    """Refuse an archive that was unpacked in part."""
    if count != published:
        raise ValueError(
            f"{folder} has {count} {what}, the published set {published}: unpack it again, or "
            "train on a part as --data folder"
        )


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

    def decode(path: Path) -> np.ndarray:
        return _decode(path, channels, size, crop)

    # Pillow decodes and resizes without holding the interpreter's lock.
    with ThreadPoolExecutor() as threads:
        for start in range(0, len(paths), _BATCH):
            yield np.stack(list(threads.map(decode, paths[start : start + _BATCH])))


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
