"""What a traced plan depends on: everything the trace bakes in, as one hashable key.

A plan holds the decoder's Python-level decisions as constants: its structure, training flags and
plain attributes, the shapes and dtypes of parameters. The key is rebuilt at every call, so that
changing `decoder.scale = 2.0` or calling `decoder.train()` leads to a new plan. Python globals,
closures and class attributes that a forward method reads are beyond it.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Attributes that nn.Module keeps for itself; `training` and the tensors are read separately.
_INTERNAL = frozenset(nn.Module().__dict__)
_PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device})
_OPAQUE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
# Deep enough for a configuration object inside a configuration object.
_MAX_DEPTH = 6


class Fingerprint(NamedTuple):
    """A decoder's key together with the tensors that a plan takes as inputs.

    Attributes:
        key: hashable; equal keys mean that a plan is still valid.
        names: the dotted names of the distinct parameters and buffers.
        tensors: those parameters and buffers, as they are now.
        anchors: objects that the key knows by identity; a plan keeps them alive, so that no
            other object can take their identity.
    """

    key: tuple
    names: list[str]
    tensors: list[Tensor]
    anchors: list[Any]


def modules_with_paths(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All submodules depth first, shared ones once per place."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from modules_with_paths(child, f"{path}.{name}" if path else name)


def fingerprint(decoder: nn.Module) -> Fingerprint:
    """Read everything a trace of the decoder would bake in; no device synchronisation."""
    key: list[Any] = []
    names: list[str] = []
    tensors: list[Tensor] = []
    anchors: list[Any] = []
    places: dict[int, int] = {}
    for path, module in modules_with_paths(decoder):
        key.append((path, module.__class__, module.training))
        prefix = f"{path}." if path else ""
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is None:
                    continue
                place = places.setdefault(id(tensor), len(tensors))
                if place == len(tensors):
                    names.append(prefix + name)
                    tensors.append(tensor)
                key.append((name, place, *_signature(tensor)))
        skipped = _INTERNAL
        if module._forward_pre_hooks or module._forward_hooks:
            hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
            key.extend(_freeze(hook, anchors, 0) for hook in hooks)
            # The old weight_norm and spectral_norm leave a new weight under this name each time.
            skipped = _INTERNAL.union(getattr(hook, "name", "") for hook in hooks)
        for name, value in module.__dict__.items():
            if name not in skipped:
                key.append((name, _freeze(value, anchors, 0)))
    return Fingerprint(tuple(key), names, tensors, anchors)


def freeze(value: Any, anchors: list[Any]) -> Any:
    """A hashable stand-in for a Python value that the trace bakes in."""
    return _freeze(value, anchors, 0)


def _signature(tensor: Tensor) -> tuple:
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)


def _freeze(value: Any, anchors: list[Any], depth: int) -> Any:
    kind = value.__class__
    if kind in _PLAIN:
        # The class tells 2 from 2.0 and from True, which compare equal.
        return (kind, value)
    if kind is tuple or kind is list:
        return (kind, *[_freeze(item, anchors, depth + 1) for item in value])
    if depth < _MAX_DEPTH:
        if isinstance(value, (tuple, list)):
            return (kind, *[_freeze(item, anchors, depth + 1) for item in value])
        if isinstance(value, dict):
            return (kind, *[(k, _freeze(v, anchors, depth + 1)) for k, v in value.items()])
        if isinstance(value, nn.Module):
            # A module outside the module tree, for example in a plain list.
            inner = fingerprint(value)
            anchors.extend(inner.anchors)
            anchors.extend(inner.tensors)
            return (id(value), inner.key, *map(id, inner.tensors))
        if isinstance(value, Tensor):
            anchors.append(value)
            # A forward may read the value of a constant; a trained tensor is only computed with.
            version = -1 if value.requires_grad else value._version
            return (id(value), version, *_signature(value))
        if not isinstance(value, _OPAQUE) and getattr(value, "__dict__", None):
            anchors.append(value)
            return (id(value), _freeze(value.__dict__, anchors, depth + 1))
    anchors.append(value)
    return id(value)
