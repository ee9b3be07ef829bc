"""From the images of a set to its training and test images, with what was found on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastsfvae.data.cache import Conversion
from fastsfvae.data.decode import Decoded, Item, decode, require_pillow, strict
from fastsfvae.data.split import Split, every_tenth
from fastsfvae.data.text import counted, some

_BATCH = 256
_NAMED = 5


class Source(NamedTuple):
    """A set that is read now.

    Attributes:
        total: about how many images it has, for the progress.
        items: its images; where they say their part, those for testing come first.
        notes: what was found in reading them; complete when they are through.
    """

    total: int
    items: Iterable[Item]
    notes: list[str]


class Found(NamedTuple):
    """A set of images on disk.

    Attributes:
        paths: the files that it is made from.
        open: starts to read it.
        notes: what was not taken.
        published: whether its split is the published one, which nothing changes.
        part: what is there, as a result is labelled, where that is a part of a published set.
    """

    paths: list[Path]
    open: Callable[[], Source]
    notes: list[str]
    published: bool = False
    part: str = ""


class Settings(NamedTuple):
    """What becomes of an image: `decode`'s settings, and whether the set goes on without it."""

    channels: int
    size: int
    crop: int
    skip_bad: bool


def convert_images(where: str, found: Found, settings: Settings) -> Conversion:
    """Decode a set; its parts are "train" and "test".

    Args:
        where: the folder, as an error names it.
        found: the set.
        settings: what becomes of each image.

    The facts are the number of images tried, their scale, what was skipped, notes, and what was
    left out, each a name and a reason.

    Raises:
        RuntimeError: without Pillow.
        ValueError: by the batches, behind the last: for images that cannot be read, in one line
            that names them, unless they are to be skipped; for a set of which nothing is left.
    """
    require_pillow()
    source = found.open()
    facts: dict[str, Any] = {}
    shape = (settings.channels, settings.size, settings.size)
    return Conversion(shape, source.total, _batches(where, found, source, settings, facts), facts)


def _batches(
    where: str, found: Found, source: Source, settings: Settings, facts: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    split = Split()
    scales: Counter[str] = Counter()
    frames: list[str] = []
    left_out: list[tuple[str, str]] = []
    for number, (item, result) in enumerate(_decoded(source.items, settings)):
        if result.pixels is None:
            left_out.append((item.name, result.reason))
            continue
        scales[result.scale] += 1
        if result.frames:
            frames.append(item.name)
        if found.published:
            yield item.part or every_tenth(number), result.pixels[None]
        elif part := split.place(result.pixels, item.name, number, item.part):
            yield part, result.pixels[None]
    count = sum(scales.values()) + len(left_out)
    listed = _unreadable(left_out, count)
    if left_out and not settings.skip_bad:
        raise ValueError(f"{where}: {listed}: replace or remove them, or give --skip-bad")
    if left_out and not scales:
        raise ValueError(f"{where}: {listed}: nothing is left to train on")
    notes = [*source.notes, *split.notes()]
    if frames:
        what = counted(len(frames), "file has", "files have")
        notes.append(f"{what} several frames, of which the first is read: {some(frames, _NAMED)}")
    if left_out:
        notes.append(f"left out, as --skip-bad says: {listed}")
    scale = ", ".join(
        name if len(scales) == 1 else f"{name} ({n:,})" for name, n in scales.most_common()
    )
    facts.update(images=count, scale=scale, skipped=found.notes, notes=notes, left_out=left_out)


def _decoded(items: Iterable[Item], settings: Settings) -> Iterator[tuple[Item, Decoded]]:
    def work(item: Item) -> Decoded:
        return decode(item, settings.channels, settings.size, settings.crop)

    items = iter(items)
    # Pillow decodes and resizes without holding the interpreter's lock.
    with ThreadPoolExecutor() as threads:
        while chunk := list(islice(items, _BATCH)):
            with strict():
                results = list(threads.map(work, chunk))
            yield from zip(chunk, results, strict=True)


def _unreadable(left_out: list[tuple[str, str]], count: int) -> str:
    named = some([f"{name} {reason}" for name, reason in left_out])
    return f"{len(left_out):,} of {count:,} files cannot be read: {named}"
