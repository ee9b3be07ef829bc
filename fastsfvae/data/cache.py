"""Image sets converted once to one uint8 file that is memory-mapped from then on.

A set is ``<key>.npy`` and ``<key>.json``; the second, written last, makes the first count. It holds
what the images were made from and their checksum, so that an interrupted conversion, a changed
source or a damaged file is converted anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastsfvae.ground.progress import counter

Shape = tuple[int, ...]
Convert = Callable[[], tuple[Shape, Iterable[np.ndarray]]]

_CHECKSUM_BYTES = 2**24


def cache_folder() -> Path:
    """``$FASTSFVAE_CACHE``, or ``fastsfvae`` in the user's cache folder."""
    if folder := os.environ.get("FASTSFVAE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsfvae"


def fingerprint(paths: Iterable[Path], *settings: object) -> str:
    """A digest that changes with a file's name, size or time, and with a setting."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in paths:
        status = path.stat()
        digest.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def open_cached(name: str, made_from: str, convert: Convert) -> Tensor:
    """Map a converted set, converting it first where that was not done.

    Args:
        name: what the files are called, beside the fingerprint.
        made_from: `fingerprint` of the source.
        convert: gives ``(N, C, H, W)`` and uint8 arrays ``[b, C, H, W]``, N images in all; not
            called where the set is there already.

    Returns:
        uint8 ``[N, C, H, W]``, read from disk as it is used; writing to it does not reach the file.

    Raises:
        OSError: where the disk is full or the folder cannot be written; nothing is left behind.
        ValueError: for another number of images than N.
    """
    path = cache_folder() / f"{name}-{made_from[:16]}.npy"
    record = path.with_suffix(".json")
    if not _is_whole(path, record, made_from):
        with _writing(path), _alone(path.with_suffix(".lock")):
            # Another process may have converted it while this one waited.
            if not _is_whole(path, record, made_from):
                _write(path, record, made_from, *convert())
    # Copy-on-write: torch warns of arrays that it could not write to.
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _is_whole(path: Path, record: Path, made_from: str) -> bool:
    try:
        written = json.loads(record.read_text())
        return written == {"made_from": made_from, "crc32": _checksum(path)}
    except (OSError, ValueError):
        return False


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror}): make room, or name another folder in "
            "FASTSFVAE_CACHE"
        ) from error


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait for other processes; the system ends the claim of one that dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(
    path: Path, record: Path, made_from: str, shape: Shape, images: Iterable[np.ndarray]
) -> None:
    # What a killed conversion left under these names is written over.
    temporary = path.with_suffix(".npy.tmp")
    note = path.with_suffix(".json.tmp")
    record.unlink(missing_ok=True)
    try:
        with temporary.open("wb") as file, counter(f"convert {path.stem}", shape[0]) as advance:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            written = 0
            for batch in images:
                file.write(np.ascontiguousarray(batch, dtype=np.uint8).data)
                written += len(batch)
                advance(len(batch))
            if written != shape[0]:
                raise ValueError(f"{path.stem}: {written} images where {shape[0]} were announced")
            file.flush()
            os.fsync(file.fileno())
        checksum = _checksum(temporary)
        os.replace(temporary, path)
        note.write_text(json.dumps({"made_from": made_from, "crc32": checksum}))
        os.replace(note, record)
    finally:
        temporary.unlink(missing_ok=True)
        note.unlink(missing_ok=True)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_CHECKSUM_BYTES):
            value = zlib.crc32(block, value)
    return value
