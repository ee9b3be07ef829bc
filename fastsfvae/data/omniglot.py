"""Omniglot at 28x28 in the split of the importance-weighted papers: 24,345 and 8,070 characters."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

FILE = "chardata.mat"
_MD5 = "21ecaf34373511aa7691cf2e0802aa3d"
_ARRAY = {"train": "data", "test": "testdata"}


def find_mat(folder: Path) -> Path:
    """The archive in `folder`, or `folder` where that is the file.

    Raises:
        FileNotFoundError: where there is none, in one line that says what is expected.
    """
    path = folder if folder.is_file() else folder / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {FILE}: put it there (github.com/yburda/iwae, datasets/OMNIGLOT)"
        )
    return path


def read_mat(path: Path, split: str) -> np.ndarray:
    """Read a split, uint8 ``[N, 1, 28, 28]``: the grey levels as stored, in 255ths.

    Raises:
        RuntimeError: without SciPy.
        ValueError: for a file that is not the published one, in one line that names it.
    """
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if digest != _MD5:
        raise ValueError(f"{path} has md5 {digest}, the published file {_MD5}: fetch it again")
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise RuntimeError(
            f'reading {path.name} needs SciPy: pip install "fastsfvae[data]"'
        ) from error
    columns = loadmat(path, variable_names=[_ARRAY[split]])[_ARRAY[split]]
    # One image a column, itself stored column by column.
    images = columns.T.reshape(-1, 1, 28, 28).swapaxes(2, 3)
    return np.rint(255 * images).astype(np.uint8)
