"""A state of tensors, numbers, strings and containers as one safetensors file with a checksum.

Every tensor is a safetensors tensor under its path, such as ``encoder.0.weight`` or
``optimizer.state.0.exp_avg``; any tool that reads safetensors sees it. The file's ``__metadata__``
holds the rest: ``state``, the containers as JSON; ``format``, whose file it is; and ``sha256``, of
the whole file with that sum's own place filled with zeros, as safetensors has no checksum itself.
Nothing is pickled, and nothing that is read is executed.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

# JSON ends a string before an unescaped quote: no name or text of a state can look like this.
_MARK = b'"sha256":"'
_ZEROS = b"0" * 64
_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool),
}
_PLAIN = (bool, int, float, str, type(None))


def pack(state: dict[str, Any], format_: str) -> list[bytes | memoryview]:
    """Lay a state out as the parts of a file, which follow one another.

    Args:
        state: tensors of any device, numbers, strings, None, and dicts, lists and tuples of them.
        format_: names the file's kind; `unpack` asks for the same.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: for anything else, which is named by its path.
        ValueError: for two tensors of one path.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(state, "", tensors), separators=(",", ":"))
    metadata = {"format": format_, "state": tree, "sha256": _ZEROS.decode()}
    content = _safetensors().save(tensors, metadata)
    start, end = _place(content)
    whole = memoryview(content)
    return [whole[:start], hashlib.sha256(content).hexdigest().encode(), whole[end:]]


def unpack(content: bytes, format_: str) -> dict[str, Any]:
    """Give back the state that `pack` was given, to the bit; tensors lie on the CPU.

    Raises:
        ImportError: safetensors is not installed.
        ValueError, and errors of json and safetensors: for content that is not a whole file of this
            format.
    """
    safetensors = _safetensors()
    start, end = _place(content)
    whole, digest = memoryview(content), hashlib.sha256()
    for part in (whole[:start], _ZEROS, whole[end:]):
        digest.update(part)
    if digest.hexdigest().encode() != content[start:end]:
        raise ValueError("its content does not have the checksum that it states")
    metadata = json.loads(content[8 : _header_end(content)])["__metadata__"]
    if metadata["format"] != format_:
        raise ValueError(f"its format is {metadata['format']!r}, not {format_!r}")
    return _decode(json.loads(metadata["state"]), safetensors.load(content))


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("checkpoints need safetensors: pip install 'fastsfvae[train]'") from error
    return safetensors.torch


def _header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def _place(content: bytes) -> tuple[int, int]:
    """Where the checksum stands."""
    found = content.find(_MARK, 8, _header_end(content))
    if found < 0:
        raise ValueError("it states no checksum")
    start = found + len(_MARK)
    return start, start + len(_ZEROS)


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Turn a state into what JSON can say; put its tensors into a dictionary.

    Numbers, strings and lists stand for themselves. An object has one key that says what it is,
    since JSON knows neither tuples nor keys that are numbers.
    """

    def encode(part: Any, key: Any) -> Any:
        return _encode(part, f"{path}.{key}".removeprefix("."), tensors)

    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return [encode(part, i) for i, part in enumerate(value)]
    if kind is tuple:
        return {"tuple": [encode(part, i) for i, part in enumerate(value)]}
    if kind in (dict, OrderedDict):
        pairs = [[encode(key, "key"), encode(part, key)] for key, part in value.items()]
        if kind is dict:
            return {"dict": pairs}
        # Modules keep the versions of their parts there, which load_state_dict asks for.
        return {"state_dict": pairs, "versions": encode(getattr(value, "_metadata", None), "_")}
    if kind not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
        raise TypeError(f"{path} is a {kind.__name__}, which a checkpoint cannot hold: {_TAKEN}")
    tensor = value.detach()
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if real.dtype not in _DTYPES:
        raise TypeError(f"{path} is of {tensor.dtype}, which a checkpoint cannot hold: {_TAKEN}")
    if path in tensors:
        raise ValueError(f"two tensors are named {path}: rename a module or a parameter")
    # A copy: safetensors takes no two that share memory, as tied weights do.
    tensors[path] = real.resolve_neg().cpu().clone(memory_format=torch.contiguous_format)
    return {"complex" if tensor.is_complex() else "tensor": path}


_TAKEN = "it takes dense tensors, numbers, strings, None, and dicts, lists and tuples of them"


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    (kind, inside), *more = value.items()
    if kind == "tensor":
        return tensors[inside]
    if kind == "complex":
        return torch.view_as_complex(tensors[inside])
    if kind == "tuple":
        return tuple(_decode(part, tensors) for part in inside)
    pairs = ((_decode(key, tensors), _decode(part, tensors)) for key, part in inside)
    if kind == "dict":
        return dict(pairs)
    state = OrderedDict(pairs)
    ((_, versions),) = more
    if versions is not None:
        state._metadata = _decode(versions, tensors)  # type: ignore[attr-defined]
    return state
