"""Omniglot's drawings: the whole set, or the two small parts that are published beside it."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fastsfvae.data import files
from fastsfvae.data.convert import Found, Source
from fastsfvae.data.decode import SUFFIXES, Item
from fastsfvae.data.text import counted, printable

_PARTS = ("images_background_small1", "images_background_small2")
_WHOLE = ("images_background", "images_evaluation")
_AROUND = ("", "omniglot-py")


class _Drawing(NamedTuple):
    """A drawing of one of the parts: its alphabet, character and file; where it lies; its bytes."""

    key: tuple[str, ...]
    place: str
    read: Callable[[], bytes]


def find(folder: Path) -> Found:
    """Omniglot's drawings in `folder`: the whole set, else what there is of the two small parts.

    The whole set is `fastsfvae.data.files.find_omniglot`'s. A part is ``images_background_small1``
    or ``_small2``, a folder or a .zip, in `folder` or in torchvision's ``omniglot-py`` in it, or
    `folder` itself. A drawing that both have is taken once. Every tenth drawing is for testing, by
    alphabet, character and drawer: of a character's 20 drawers, the tenth and the twentieth.

    Raises:
        FileNotFoundError: where there is neither.
        ValueError: for a part of the whole set's folders, for a damaged zip, and for two drawings
            of one name that differ, in one line.
    """
    roots = [root for name in _PARTS if (root := _root(folder, name)) is not None]
    whole = any((folder / around / name).is_dir() for around in _AROUND for name in _WHOLE)
    if whole or not roots:
        return files.find_omniglot(folder)
    drawings = sorted((each for root in roots for each in _drawings(root)), key=lambda d: d.key)
    distinct = {drawing.key for drawing in drawings}
    alphabets = len({key[0] for key in distinct})
    what = (
        f"a part: {counted(len(distinct), 'drawing', 'drawings')} of "
        f"{counted(alphabets, 'alphabet', 'alphabets')}"
    )
    note = f"{what}, of which every tenth (drawers 10 and 20) is for testing"
    paths = [path for root in roots for path in ([root] if root.is_file() else _files(root))]
    return Found(paths, lambda: Source(len(distinct), _items(drawings), []), [note], part=what)


def _root(folder: Path, name: str) -> Path | None:
    """The folder or the zip of a part."""
    if folder.name in (name, f"{name}.zip") and folder.exists():
        return folder
    for around in _AROUND:
        if (root := folder / around / name).is_dir():
            return root
        if (root := root.with_name(f"{name}.zip")).is_file():
            return root
    return None


def _files(root: Path) -> list[Path]:
    return files.by_ending(files.walk(root)[0], SUFFIXES, "images")[0]


def _drawings(root: Path) -> list[_Drawing]:
    if root.is_dir():
        return [_Drawing(path.parts[-3:], str(path), path.read_bytes) for path in _files(root)]
    try:
        archive = zipfile.ZipFile(root)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{root} is damaged ({error}): fetch it again") from error
    found = []
    for name in archive.namelist():
        parts = PurePosixPath(name).parts
        if name.lower().endswith(SUFFIXES) and not any(map(files.is_hidden, parts)):
            read = partial(_read, archive, name)
            found.append(_Drawing(parts[-3:], f"{root}: {printable(name)}", read))
    return found


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    # An encrypted one is a RuntimeError, an unknown compression a NotImplementedError.
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{archive.filename} is damaged ({error}): fetch it again") from error


def _items(drawings: list[_Drawing]) -> Iterator[Item]:
    """Each drawing once; those of one key lie side by side."""
    last, held = None, b""
    for drawing in drawings:
        content = drawing.read()
        if last is not None and last.key == drawing.key:
            if content != held:
                raise ValueError(
                    f"{last.place} and {drawing.place} differ, where both are to be one drawing: "
                    "unpack or fetch them again"
                )
            continue
        last, held = drawing, content
        yield Item(printable("/".join(drawing.key)), None, partial(io.BytesIO, content))
