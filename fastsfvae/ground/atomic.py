"""Files that are written whole or not at all."""

from __future__ import annotations

import os
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
