"""Folders of .tar shards as WebDataset has them. Needs `webdataset` and Pillow."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fastsfvae.data.convert import Found, Source
from fastsfvae.data.decode import SUFFIXES, Item
from fastsfvae.data.files import by_ending, is_hidden, walk
from fastsfvae.data.named_parts import choose
from fastsfvae.data.text import counted, printable, some

_ENDINGS = (".tar", ".tar.gz", ".tgz")
_PARTS = ("train", "test", "validation", "valid", "val")
# Two empty blocks end a .tar.
_END = bytes(1024)
_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error)


def find(folder: Path) -> Found:
    """The shards below `folder`.

    Those in folders named train and test, or whose names begin so, are for that; else every tenth
    image is for testing.

    Raises:
        FileNotFoundError: where there are none.
    """
    files = walk(folder)[0] if folder.is_dir() else []
    shards, notes = by_ending(files, _ENDINGS, "shards")
    if not shards:
        raise FileNotFoundError(f"{folder} has no shards (.tar): give the folder that holds them")
    return Found(shards, partial(_open, folder, shards), notes)


def _open(folder: Path, shards: list[Path]) -> Source:
    try:
        import webdataset  # noqa: F401 - reads the shards below
    except ImportError as error:
        raise RuntimeError(
            'reading data="webdataset" needs webdataset: pip install "fastsfvae[webdataset]"'
        ) from error
    of_part: dict[str, list[Path]] = {}
    for path in shards:
        top = path.relative_to(folder).parts[0].lower()
        part = next((name for name in _PARTS if top.startswith(name)), "others")
        of_part.setdefault(part, []).append(path)
    notes: list[str] = []
    chosen: list[tuple[str | None, list[Path]]] = [(None, shards)]
    if {"train", "test"} & of_part.keys():
        chosen, notes = choose(of_part)
    count = sum(_count(path) for _, paths in chosen for path in paths)
    return Source(count, _items(folder, chosen, notes), notes)


def _count(path: Path) -> int:
    """How many images a shard holds.

    Raises:
        ValueError: for a shard that is damaged, or cut short, which its reader may not notice.
    """
    try:
        if path.name.lower().endswith(".tar"):
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - len(_END)))
                if file.read() != _END:
                    raise ValueError("its end is missing")
        with tarfile.open(path) as tar:
            names = [member.name for member in tar if member.isreg()]
    except _ERRORS as error:
        raise _damaged(path, error) from error
    images = Counter(name for name in names if _is_image(name))
    if twice := [printable(name) for name, count in images.items() if count > 1]:
        raise ValueError(f"{path} holds more than one {some(twice)}: give each a name of its own")
    return len(images)


def _items(
    folder: Path, chosen: list[tuple[str | None, list[Path]]], notes: list[str]
) -> Iterator[Item]:
    without = samples = 0
    for part, paths in chosen:
        for path in paths:
            keys: set[str] = set()
            for sample in _samples(path):
                samples += 1
                key = sample["__key__"]
                images = [name for name in sample if name[:2] != "__" and _is_image(f"x.{name}")]
                name = f"{printable(path.relative_to(folder))}: {printable(key)}"
                if len(images) > 1:
                    raise ValueError(
                        f"{folder}: {name} has {len(images)} images ({some(images)}), and which "
                        "is meant is not known: keep one a sample"
                    )
                if not images:
                    without += 1
                    continue
                if key in keys:
                    raise ValueError(
                        f"{folder}: {name} is there twice: give each sample a key of its own"
                    )
                keys.add(key)
                yield Item(name, part, partial(io.BytesIO, sample[images[0]]))
    if without:
        what = counted(without, "sample has", "samples have")
        notes.append(f"{what} no image, of {samples:,}")


def _samples(path: Path) -> Iterator[dict]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        # Opened here: the library takes some names for commands or addresses.
        with path.open("rb") as stream:
            source = [{"url": str(path), "stream": stream}]
            yield from group_by_keys(tar_file_expander(source, select_files=_is_taken))
    except _ERRORS as error:
        raise _damaged(path, error) from error


def _is_taken(name: str) -> bool:
    return not any(is_hidden(part) for part in name.removeprefix("./").split("/"))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and _is_taken(name)


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error.args[0] if error.args else error).split())
    return ValueError(f"{path} is damaged or cut short ({reason}): fetch it again")
