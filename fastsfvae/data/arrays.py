"""Arrays of images in a .npz, .npy or .pt file."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastsfvae.data.cache import Conversion
from fastsfvae.data.split import PARTS, Split
from fastsfvae.data.text import printable, some

_SHAPES = "give [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels"
_WHOLE = "images"
_BATCH = 256
# What rounding to 255ths may change and still be called exact, at most.
_EXACT = 0.1 / 255
_EPS = float(np.finfo(np.float64).eps)


class _Array(NamedTuple):
    """Images in the order [N, C, H, W]; `eps` is the spacing of the values at 1."""

    values: np.ndarray
    eps: float
    dtype: str


class _Scale(NamedTuple):
    """From stored values to 0..1: add, then multiply."""

    name: str
    add: float
    multiply: float


def find(path: Path) -> Path:
    """The file of both parts itself.

    Raises:
        FileNotFoundError: where there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file: give the .npz archive, .npy or .pt file as --data-dir"
        )
    return path


def convert(path: Path) -> Conversion:
    """Read ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]``; its parts are "train" and "test".

    The arrays ``train`` and ``test``, or one array ``images`` (or one without a name) whose every
    tenth is for testing. Of uint8, uint16 (by 65535), bool, other integers in 0..255, or floats in
    [0, 1] or [-1, 1]; which it is, is told from all arrays together.

    Raises:
        ValueError: for a file or an array that is something else, in one line that names it.
    """
    try:
        stored = _load(path)
    # A damaged file raises errors of many classes, down to MemoryError.
    except Exception as error:
        # Of a page of advice the first sentence says what is wrong.
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise ValueError(
            f"{path} is damaged or not an .npz archive, .npy or .pt file of numbers ({reason})"
        ) from error
    names: list[str] = [name for name in reversed(PARTS) if name in stored] or [_WHOLE]
    if len(names) == 1 and (names != [_WHOLE] or _WHOLE not in stored):
        held = some([repr(printable(str(name))) for name in stored])
        raise ValueError(f"{path} holds [{held}]: name the arrays train and test, or one images")
    arrays = {name: _images(f"{path}: array {name}", stored[name]) for name in names}
    shapes = {array.values.shape[1:] for array in arrays.values()}
    dtypes = {array.dtype for array in arrays.values()}
    if len(shapes) > 1 or len(dtypes) > 1:
        listed = ", ".join(f"{n} {a.dtype} {a.values.shape}" for n, a in arrays.items())
        raise ValueError(f"{path} holds {listed}: give both one dtype and images of one size")
    scale = _scale(f"{path}: array {' and '.join(names)}", list(arrays.values()))
    facts: dict[str, Any] = {}
    count = sum(len(array.values) for array in arrays.values())
    return Conversion(shapes.pop(), count, _batches(arrays, scale, facts), facts)


def _batches(
    arrays: dict[str, _Array], scale: _Scale, facts: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    stored = [array.values for array in arrays.values()]
    same = len(stored) == 2 and np.array_equal(stored[0], stored[1])
    split = Split()
    change = tolerance = 0.0
    count = 0
    for name, array in arrays.items():
        tolerance = max(tolerance, min(4 * array.eps, _EXACT))
        for start in range(0, len(array.values), _BATCH):
            pixels, changed = _to_bytes(array.values[start : start + _BATCH], scale)
            change = max(change, changed)
            given = None if name == _WHOLE else name
            count += len(pixels)
            if same:
                yield name, pixels
                continue
            parts = [
                split.place(image, f"{name} {start + row}", start + row, given)
                for row, image in enumerate(pixels)
            ]
            for part in PARTS:
                if rows := [row for row, to in enumerate(parts) if to == part]:
                    yield part, pixels[rows]
    notes = split.notes()
    if same:
        # Left out of training, nothing would remain; and this is hardly by accident.
        notes.append("train and test are the same images: the results on both are of training")
    if change > tolerance:
        notes.append(
            f"{scale.name}, kept as 255ths: this changes a pixel, in [0, 1], by up to {change:.2g}"
        )
    facts.update(images=count, scale=scale.name, notes=notes, left_out=[])


def _to_bytes(values: np.ndarray, scale: _Scale) -> tuple[np.ndarray, float]:
    """Values as 0..255, and the largest change in [0, 1]."""
    if values.dtype == np.uint8:
        return values, 0.0
    unit = (values.astype(np.float64) + scale.add) * scale.multiply
    pixels = np.rint(255 * unit)
    change = float(np.abs(pixels / 255 - unit).max())
    return pixels.astype(np.uint8), change


def _scale(what: str, arrays: list[_Array]) -> _Scale:
    """What the values of all arrays together mean.

    Raises:
        ValueError: where that is not known.
    """
    dtype, values = arrays[0].dtype, [array.values for array in arrays]
    low, high = _over(values, np.minimum), _over(values, np.maximum)
    kind = values[0].dtype.kind
    if kind == "b":
        return _Scale("bool", 0, 1)
    if kind == "f":
        # Not `low < 0 or ...`: a NaN is in no range.
        if low >= 0 and high <= 1:
            return _Scale(f"{dtype} in [0, 1]", 0, 1)
        if -1 <= low <= -0.5 and high <= 1:
            return _Scale(f"{dtype} in [-1, 1]", 1, 0.5)
        raise ValueError(
            f"{what} is {dtype} in [{low:.9g}, {high:.9g}]: scale it to [0, 1] or [-1, 1], or "
            "store images as uint8, 0 to 255"
        )
    if high == 1 and low >= 0:
        raise ValueError(
            f"{what} is {dtype} and holds only 0 and 1: store it as bool, or multiply it by 255"
        )
    if dtype == "uint16" and high > 255:
        return _Scale("uint16 by 65535", 0, 1 / 65535)
    if not (low >= 0 and high <= 255):
        raise ValueError(
            f"{what} is {dtype} in [{low:.9g}, {high:.9g}]: store images as uint8, 0 to 255"
        )
    if dtype == "uint16" and high > 0:
        raise ValueError(
            f"{what} is uint16 but reaches {high:g} only, not 65535: store such images as uint8"
        )
    return _Scale(dtype if dtype == "uint8" else f"{dtype} in 0..255", 0, 1 / 255)


def _over(arrays: list[np.ndarray], extreme: np.ufunc) -> float:
    """The smallest or largest value; NaN where there is one."""
    parts = (array[i : i + _BATCH] for array in arrays for i in range(0, len(array), _BATCH))
    return float(extreme.reduce([extreme.reduce(part, axis=None) for part in parts]))


def _images(what: str, stored: Any) -> _Array:
    """An array of numbers as images, or why it is none.

    Raises:
        ValueError: for anything else, in one line.
    """
    if isinstance(stored, torch.Tensor):
        array = _from_tensor(what, stored)
    elif not isinstance(stored, np.ndarray):
        raise ValueError(f"{what} is a {type(stored).__name__}: store one array or tensor")
    elif stored.dtype.kind not in "biuf":
        raise ValueError(f"{what} is of dtype {stored.dtype}: store images as uint8, 0 to 255")
    else:
        eps = float(np.finfo(stored.dtype).eps) if stored.dtype.kind == "f" else _EPS
        array = _Array(stored, eps, stored.dtype.name)
    values = array.values
    if values.ndim not in (3, 4) or not values.size:
        one = "; one image is [1, H, W]" if values.ndim == 2 else ""
        raise ValueError(f"{what} is {values.shape}: {_SHAPES}{one}")
    if values.ndim == 3:
        return array._replace(values=values[:, None])
    first, last = values.shape[1] in (1, 3), values.shape[3] in (1, 3)
    if first and last:
        raise ValueError(
            f"{what} is {values.shape}, with channels first or last: {_SHAPES}, and another size"
        )
    if not first and not last:
        raise ValueError(f"{what} is {values.shape}: {_SHAPES}")
    return array if first else array._replace(values=values.transpose(0, 3, 1, 2))


def _from_tensor(what: str, tensor: torch.Tensor) -> _Array:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
        raise ValueError(f"{what} is a {dtype} tensor of layout {tensor.layout}: store it dense")
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return _Array(tensor.numpy(), _EPS, dtype)
    eps = torch.finfo(tensor.dtype).eps
    # numpy knows no bfloat16.
    return _Array((tensor if dtype == "float64" else tensor.float()).numpy(), eps, dtype)


def _load(path: Path) -> dict[str, Any]:
    """What a file holds by its names; nothing in it is executed.

    Raises:
        ValueError and many others: for what is damaged or holds something else.
    """
    if _is_torch(path):
        return _load_torch(path)
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(stored, np.ndarray):
            return {_WHOLE: stored}
        with stored as archive:
            wanted = ("train", "test", _WHOLE)
            return {n: archive[n] if n in wanted else None for n in archive.files}
    except ValueError as error:
        if any(word in str(error) for word in ("allow_pickle", "Python objects")):
            raise ValueError(
                "it holds an array of objects or a pickle, which is never unpickled: store one "
                "array of numbers, all images of one size"
            ) from error
        raise


def _is_torch(path: Path) -> bool:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    return path.suffix.lower() in (".pt", ".pth")


def _load_torch(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if any(word in str(error) for word in ("nsupported global", "TorchScript")):
            raise ValueError(
                "it holds objects other than tensors, which are never unpickled: save the tensor "
                "itself"
            ) from error
        if "Weights only" in str(error):
            raise ValueError("torch.save did not write it, or it is damaged") from error
        raise
    if isinstance(stored, torch.Tensor):
        return {_WHOLE: stored}
    if not isinstance(stored, dict):
        raise ValueError(f"it holds a {type(stored).__name__}: save one tensor of all images")
    if not {*PARTS, _WHOLE} & stored.keys():
        held = some([repr(printable(str(name))) for name in stored])
        raise ValueError(
            f"it holds a dict of [{held}], as a state_dict is: name the tensors train and test, or "
            "one images"
        )
    return stored
