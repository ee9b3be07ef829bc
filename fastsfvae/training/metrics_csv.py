"""metrics.csv: the first step, then one row for each window of steps, flushed as it is written."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from fastsfvae.ground.atomic import write_text

METRICS = "metrics.csv"

Row = dict[str, float]


def rewind_metrics(path: Path, step: int, columns: Collection[str]) -> None:
    """Start the file, or drop the rows after `step`: those steps are done again.

    Raises:
        ValueError: for a damaged file, in one line.
    """
    try:
        text = path.read_text() if path.is_file() else ",".join(columns) + "\n"
        # What a full disk has cut short has no newline.
        whole = text.split("\n")[:-1]
        if not whole or set(whole[0].split(",")) - set(columns):
            raise ValueError(f"its first line should be {','.join(columns)}")
        header, *rows = whole
        kept = [row for row in rows if int(row.split(",")[0]) <= step]
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore it, or move it away to go on without its rows"
        ) from error
    write_text(path, "\n".join([header, *kept]) + "\n")


class MetricsFile:
    """Appends rows under the columns of the file's own header; without a path, writes nothing.

    Args:
        path: a file that `rewind_metrics` has started.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("r+", newline="")
        if self._file is not None:
            columns = next(csv.reader(self._file))
            self._file.seek(0, os.SEEK_END)
            self._rows = csv.DictWriter(
                self._file, columns, extrasaction="ignore", lineterminator="\n"
            )

    def write(self, row: Row) -> None:
        """Append a row.

        Raises:
            OSError: where it cannot be written, e.g. on a full disk; the rows before it are intact.
        """
        if self._file is None:
            return
        try:
            self._rows.writerow(row)
            self._file.flush()
        except OSError as error:
            # Closing tries once more to write what is left.
            with suppress(OSError):
                self._file.close()
            raise OSError(
                f"{self._file.name} could not be written ({error.strerror}): make room and --resume"
            ) from error

    def sync(self) -> None:
        """Bring the rows to the disk: a checkpoint must not outlive what it stands for."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()
