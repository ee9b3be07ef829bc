"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write into that takes the place of `path` when it is whole.

    Raises:
        OSError: where it cannot be written, e.g. on a full disk; the earlier file is intact.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            # Without it a power cut may leave the new name on an empty file.
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError.
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise OSError(
            f"{path} could not be written ({reason}): what it held before is intact"
        ) from error
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        OSError: where it cannot be written, e.g. on a full disk; the earlier file is intact.
    """
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give an empty folder to write into that becomes `path` when it is whole.

    Args:
        path: of the folder; what is missing above it is made.
        replace: whether a folder that is there already gives way to the new one.

    Raises:
        OSError: where it cannot be written, or `path` has come to hold something; nothing of it is
            left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as beside:
        # One deeper, as a temporary folder is nobody else's to read.
        inside = Path(beside, path.name)
        inside.mkdir()
        try:
            yield inside
            if replace and path.exists():
                # A kill between the two loses nothing: both are then beside.
                os.rename(path, Path(beside, "earlier"))
            os.rename(inside, path)
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise OSError(
                f"{path} could not be written ({reason}): nothing of it is left"
            ) from error


def check_writable(path: Path) -> None:
    """Raise OSError unless a file or folder `path`, which is not there yet, can be created."""
    ancestor = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=ancestor):
            pass
    except OSError as error:
        raise OSError(
            f"{path} cannot be written, as {ancestor} cannot ({error.strerror}): give another place"
        ) from error
