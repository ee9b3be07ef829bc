"""Image sets converted once to uint8 files that are memory-mapped from then on.

A part of a set (its training or its test images) is ``<key>.npy`` and ``<key>.json``; the second,
written last, makes the first count. It holds what the images were made from, how, and their
checksum, so that an interrupted conversion, a changed source or a damaged file is converted anew.
All parts of a set are written by one conversion; one without images has no ``.npy``.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsfvae.ground.locks import file_locks
from fastsfvae.ground.progress import counter

Shape = tuple[int, ...]

_CHECKSUM_BYTES = 2**24
_WHOLE = ""


class Conversion(NamedTuple):
    """Images on their way into the cache.

    Attributes:
        shape: ``(C, H, W)`` of each.
        total: how many there are to read, for the progress.
        batches: the name of a part and uint8 arrays ``[b, C, H, W]`` of it, in any order of parts.
        facts: of all parts, as JSON has them; complete when the batches are through.
    """

    shape: Shape
    total: int
    batches: Iterable[tuple[str, np.ndarray]]
    facts: dict[str, Any]


class Opened(NamedTuple):
    """A part of a set.

    Attributes:
        images: uint8 ``[N, C, H, W]``, read from disk as they are used; writing to them does not
            reach the file. None where the part has none.
        facts: what the conversion found out.
    """

    images: Tensor | None
    facts: dict[str, Any]


def cache_folder() -> Path:
    """``$FASTSFVAE_CACHE``, or ``fastsfvae`` in the user's cache folder."""
    if folder := os.environ.get("FASTSFVAE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsfvae"


def fingerprint(paths: Iterable[Path], *settings: object) -> str:
    """A digest that changes with a file's name, size, time or rights, and with a setting."""
    digest = hashlib.sha256(repr(settings).encode())
    # Links are resolved once a folder, not once a file.
    real = lru_cache(maxsize=None)(os.path.realpath)
    for path in paths:
        digest.update(os.fsencode(os.path.join(real(path.parent), path.name)))
        try:
            status = path.stat()
            known = f"{status.st_size}\0{status.st_mtime_ns}\0{status.st_mode}"
        except OSError as error:
            known = str(error.errno)
        digest.update(f"\0{known}\n".encode())
    return digest.hexdigest()


def open_cached(
    name: str, made_from: str, convert: Callable[[], tuple[Shape, Iterable[np.ndarray]]]
) -> Tensor:
    """Map a converted set of one part, converting it first where that was not done.

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

    def one_part() -> Conversion:
        (count, *shape), images = convert()
        return Conversion(tuple(shape), count, _announced(name, count, images), {})

    images = open_part(name, (_WHOLE,), _WHOLE, made_from, one_part).images
    if images is None:
        raise ValueError(f"{name} has no images")
    return images


def _announced(
    name: str, count: int, images: Iterable[np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    written = 0
    for batch in images:
        written += len(batch)
        yield _WHOLE, batch
    if written != count:
        raise ValueError(f"{name}: {written} images where {count} were announced")


def open_part(
    name: str, parts: tuple[str, ...], part: str, made_from: str, convert: Callable[[], Conversion]
) -> Opened:
    """Map a part of a converted set, converting all parts first where that was not done.

    Args:
        name: what the files are called, beside the part and the fingerprint.
        parts: all parts.
        part: the one that is wanted.
        made_from: `fingerprint` of the source.
        convert: not called where the part is there already.

    Raises:
        OSError: where the disk is full or the folder cannot be written; nothing is left behind.
    """
    paths = {
        each: cache_folder() / f"{'-'.join(filter(None, (name, each)))}-{made_from[:16]}.npy"
        for each in parts
    }
    path = paths[part]
    if (record := _whole(path, made_from)) is None:
        with _writing(path), _alone(paths[parts[0]].with_suffix(".lock")):
            # Another process may have converted it while this one waited.
            if (record := _whole(path, made_from)) is None:
                record = _write(paths, made_from, convert())[part]
    if record["crc32"] is None:
        return Opened(None, record["facts"])
    # Copy-on-write: torch warns of arrays that it could not write to.
    return Opened(torch.from_numpy(np.load(path, mmap_mode="c")), record["facts"])


def _whole(path: Path, made_from: str) -> dict[str, Any] | None:
    """The record of a part that is there and undamaged."""
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        found = None if record["crc32"] is None else _checksum(path)
        known = {"made_from": made_from, "crc32": found, "facts": record["facts"]}
        return record if record == known else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
    fcntl = file_locks()
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(
    paths: dict[str, Path], made_from: str, conversion: Conversion
) -> dict[str, dict[str, Any]]:
    """Write all parts; their records, by part."""
    # What a killed conversion left under these names is written over.
    temporary = {part: path.with_suffix(".npy.tmp") for part, path in paths.items()}
    notes = {part: path.with_suffix(".json.tmp") for part, path in paths.items()}
    for path in paths.values():
        path.with_suffix(".json").unlink(missing_ok=True)
    label = f"convert {next(iter(paths.values())).stem}"
    try:
        with ExitStack() as stack:
            files = {part: stack.enter_context(p.open("wb")) for part, p in temporary.items()}
            counts = dict.fromkeys(files, 0)
            for file in files.values():
                _write_header(file, 0, conversion.shape)
            with counter(label, conversion.total) as advance:
                for part, batch in conversion.batches:
                    files[part].write(np.ascontiguousarray(batch, dtype=np.uint8).data)
                    counts[part] += len(batch)
                    advance(len(batch))
            for part, file in files.items():
                file.seek(0)
                _write_header(file, counts[part], conversion.shape)
                file.flush()
                os.fsync(file.fileno())
        records = {}
        for part, path in paths.items():
            checksum = _checksum(temporary[part]) if counts[part] else None
            record = {"made_from": made_from, "crc32": checksum, "facts": conversion.facts}
            records[part] = record
            if counts[part]:
                os.replace(temporary[part], path)
            notes[part].write_text(json.dumps(record))
            os.replace(notes[part], path.with_suffix(".json"))
        return records
    finally:
        for path in (*temporary.values(), *notes.values()):
            path.unlink(missing_ok=True)


def _write_header(file, count: int, shape: Shape) -> None:
    """Of one length for every count: numpy leaves room for the leading axis to grow."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, header)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_CHECKSUM_BYTES):
            value = zlib.crc32(block, value)
    return value
