"""What ``save_to_disk`` of Hugging Face's `datasets` wrote. Needs that library and Pillow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from fastsfvae.data.convert import Found, Source
from fastsfvae.data.decode import Item
from fastsfvae.data.files import walk
from fastsfvae.data.named_parts import choose
from fastsfvae.data.text import printable, some

_MARKS = ("dataset_dict.json", "state.json")


def find(folder: Path) -> Found:
    """The data set, or sets of several parts, that lie in `folder`.

    Raises:
        FileNotFoundError: where there is none.
    """
    if not any((folder / name).is_file() for name in _MARKS):
        raise FileNotFoundError(
            f"{folder} has no {_MARKS[1]} and no {_MARKS[0]}: give the folder that save_to_disk "
            "of datasets wrote"
        )
    return Found(walk(folder)[0], partial(_open, folder), [])


def _open(folder: Path) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError(
            'reading data="huggingface" needs datasets: pip install "fastsfvae[huggingface]"'
        ) from error
    try:
        loaded = datasets.load_from_disk(str(folder))
    # Damaged files raise errors of pyarrow's, of json's and of others.
    except Exception as error:
        raise ValueError(f"{folder} is damaged ({_line(error)}): save it again") from error
    notes: list[str] = []
    chosen: list[tuple[str | None, datasets.Dataset]] = [(None, loaded)]
    if isinstance(loaded, datasets.DatasetDict):
        if not {"train", "test"} & loaded.keys():
            parts = some([printable(name) for name in loaded])
            raise ValueError(f"{folder} has the parts {parts}: name them train and test")
        chosen, notes = choose(loaded)
    chosen = [(part, _column(folder, data)) for part, data in chosen]
    return Source(sum(len(data) for _, data in chosen), _items(folder, chosen), notes)


def _column(folder: Path, data):
    """The column of images, undecoded."""
    import datasets

    images = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    if len(images) != 1:
        columns = some([f"{printable(n)} ({type(f).__name__})" for n, f in data.features.items()])
        raise ValueError(
            f"{folder} has {len(images)} columns of images, not one, among {columns}: keep one "
            "with remove_columns, or make it one with cast_column and datasets.Image()"
        )
    return data.select_columns(images).cast_column(images[0], datasets.Image(decode=False))


def _items(folder: Path, chosen: list) -> Iterator[Item]:
    for part, data in chosen:
        (column,) = data.features
        rows = iter(data)
        for number in range(len(data)):
            try:
                stored = next(rows)[column]
            except Exception as error:
                raise ValueError(
                    f"{folder} is damaged at row {number} ({_line(error)}): save it again"
                ) from error
            name = f"{part} row {number}" if part else f"row {number}"
            yield Item(name, part, partial(_stream, stored))


def _stream(stored: dict | None) -> BinaryIO:
    if stored is None or stored.get("bytes") is None:
        # A path is not followed: it may be of another machine, or lead to a network.
        raise ValueError("the row holds no image")
    return io.BytesIO(stored["bytes"])


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
