"""Tiles by measurement: what was the fastest on a device takes the place of a launcher's choice.

`tiles.json` has them, by the device's name and by the launch (`key_of`); `python -m bench.gpu`
measures them, and its --merge writes the file. They hold for one minor version of Triton, as
another compiler may spill. All other launches are made as their launchers choose. Batch and slots
are not in a launch's name: a tile is right for any number of samples, as a launcher's choice is.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from ._launch import DeviceLimits

TILES = Path(__file__).with_name("tiles.json")
# Registers of a multiprocessor, all of which one program may have.
_REGISTERS = 2**16

Fields = Mapping[str, Any]
T = TypeVar("T")


class Asked(NamedTuple):
    """A launch whose tile was asked for.

    Attributes:
        kernel: its name.
        tile: what it is launched with unless other fields are tried.
        blocks: sizes that may be others, powers of two, and the least of each.
    """

    kernel: str
    tile: Any
    blocks: Mapping[str, int]


def version() -> str:
    """Triton's, as the file names it: tiles of 3.6.1 hold for 3.6.0."""
    return ".".join(triton.__version__.split(".")[:2])


def read(table: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Fields]]:
    """Of what the file holds, the tiles of this version of Triton, by device and launch."""
    return {name: dict(of["tiles"]) for name, of in table.items() if of["triton"] == version()}


_measured = read(json.loads(TILES.read_text()))
# Of a sweep, in whatever thread a launch is made: None outside of one.
_tried: Mapping[str, Fields] | None = None
_asked: dict[str, Asked] | None = None


def tunes(limits: DeviceLimits) -> bool:
    """Whether there may be other tiles than a launcher's own: if not, no launch is named."""
    return limits.name in _measured or _tried is not None or _asked is not None


def tuned(
    kernel: str, tile: T, limits: DeviceLimits, blocks: Mapping[str, int], /, **given: Any
) -> T:
    """The tile to launch with: the measured one, and in a sweep the one that is tried.

    Args:
        kernel: the launch's.
        tile: the launcher's choice, a frozen dataclass.
        limits: of the device.
        blocks: sizes that may be others, powers of two, and the least of each; besides those the
            warps, stages, registers and, where a tile has them, copies and programs.
        given: all that the choice depends on, by name.

    Raises:
        ValueError: fields that the kernel cannot take.
    """
    if _tried is None and _asked is None:
        return _found(kernel, tile, limits.name, tuple(blocks.items()), tuple(given.items()))
    key = key_of(kernel, given)
    tile = changed(tile, _measured.get(limits.name, {}).get(key, {}), blocks)
    if _asked is not None:
        _asked.setdefault(key, Asked(kernel, tile, blocks))
    return changed(tile, (_tried or {}).get(key, {}), blocks)


@functools.lru_cache(maxsize=4096)
def _found(kernel: str, tile: Any, name: str, blocks: tuple, given: tuple) -> Any:
    fields = _measured.get(name, {}).get(key_of(kernel, dict(given)), {})
    return changed(tile, fields, dict(blocks))


def key_of(kernel: str, given: Mapping[str, Any]) -> str:
    """A launch as the file names it: the kernel and what its tile depends on."""
    return " ".join([kernel, *(f"{name}={_word(value)}" for name, value in given.items())])


def _word(value: Any) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)


def changed(tile: T, fields: Fields, blocks: Mapping[str, int]) -> T:
    """A tile with other fields.

    Raises:
        ValueError: fields that it does not have, that are not free, or values that no kernel takes.
    """
    if not fields:
        return tile
    known: dict[str, Any] = asdict(tile)  # type: ignore[call-overload]
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"{name}={value}: a tile has {', '.join(known)}")
        if value != known[name] and not _takes(name, value, blocks):
            raise ValueError(f"{name}={value} is not one that this kernel takes")
    tile = replace(tile, **fields)  # type: ignore[type-var]
    options = known | dict(fields)
    threads, registers = 32 * options["num_warps"], options["maxnreg"]
    if registers and -(-registers // 8) * 8 * threads > _REGISTERS:
        raise ValueError(f"{threads} threads of maxnreg={registers} are more than a program has")
    return tile


def _takes(name: str, value: Any, blocks: Mapping[str, int]) -> bool:
    if name == "by_l1":
        return isinstance(value, bool)
    if name == "maxnreg" and value is None:
        return True
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    power = value > 0 and value & (value - 1) == 0
    if name in blocks:
        return power and value >= blocks[name]
    if name == "num_warps":
        return power and value <= 32
    return {
        "num_stages": 1 <= value <= 8,
        "maxnreg": 24 <= value <= 256,
        "programs": 1 <= value <= 32,
    }.get(name, False)


@contextlib.contextmanager
def trying(fields: Mapping[str, Fields]) -> Iterator[None]:
    """Launch, inside a block, with other fields of the tiles of these launches, by their names."""
    global _tried
    before, _tried = _tried, fields
    try:
        yield
    finally:
        _tried = before


@contextlib.contextmanager
def asking() -> Iterator[dict[str, Asked]]:
    """Write down, inside a block, the launches whose tile is asked for, by their names."""
    global _asked
    before, _asked = _asked, {}
    try:
        yield _asked
    finally:
        _asked = before


@contextlib.contextmanager
def measured(table: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Take, inside a block, a table of the file's form in its place."""
    global _measured
    before, _measured = _measured, read(table)
    _found.cache_clear()
    try:
        yield
    finally:
        _measured = before
        _found.cache_clear()
