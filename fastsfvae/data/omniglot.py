"""Omniglot at 28x28 in the split of the importance-weighted papers: 24,345 and 8,070 characters."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from fastsfvae.data.download import OMNIGLOT_FILE, OMNIGLOT_MD5, missing

_ARRAY = {"train": "data", "test": "testdata"}


def find(folder: Path, split: str) -> Path:
    """The archive of both splits in `folder`, or `folder` where that is the file.

    Raises:
        FileNotFoundError: where there is none, in one line that says what is expected.
    """
    path = folder if folder.is_file() else folder / OMNIGLOT_FILE
    if not path.is_file():
        raise missing("omniglot", f"{folder} has no {OMNIGLOT_FILE}")
    return path


def read(path: Path, split: str) -> tuple[np.ndarray, list[str]]:
    """Read a split, uint8 ``[N, 1, 28, 28]``, with no notes: the grey levels as stored, in 255ths.

    Raises:
        RuntimeError: without SciPy.
        ValueError: for a file that is not the published one, in one line that names it.
    """
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if digest != OMNIGLOT_MD5:
        raise ValueError(
            f"{path} has md5 {digest}, the published file {OMNIGLOT_MD5}: remove it and fetch it "
            "again"
        )
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise RuntimeError(
            f'reading {path.name} needs SciPy: pip install "fastsfvae[data]"'
        ) from error
    columns = loadmat(path, variable_names=[_ARRAY[split]])[_ARRAY[split]]
    # One image a column, itself stored column by column.
    images = columns.T.reshape(-1, 1, 28, 28).swapaxes(2, 3)
    return np.rint(255 * images).astype(np.uint8), []
