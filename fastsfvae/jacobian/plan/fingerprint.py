"""What a traced plan depends on: everything the trace bakes in, as one hashable key.

A plan holds the decoder's Python-level decisions as constants: its structure, training flags and
plain attributes, the shapes and dtypes of parameters. The key is rebuilt at every call, so that
changing `decoder.scale = 2.0` or calling `decoder.train()` leads to a new plan. Python globals,
closures and class attributes that a forward method reads are beyond it.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

# Attributes that nn.Module keeps for itself; `training` and the tensors are read separately.
_INTERNAL = frozenset(nn.Module().__dict__)
_PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device})
_OPAQUE = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)


class Fingerprint(NamedTuple):
    """A decoder's key together with the tensors that a plan takes as inputs.

    Attributes:
        key: hashable; equal keys mean that a plan is still valid. Refers weakly to what it knows
            by identity.
        names: the dotted names of the distinct parameters and buffers.
        tensors: those parameters and buffers, as they are now.
    """

    key: tuple
    names: list[str]
    tensors: list[Tensor]


def modules_with_paths(module: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """All submodules depth first, shared ones once per place."""
    found = [(path, module)]
    for name, child in module._modules.items():
        if child is not None:
            found += modules_with_paths(child, f"{path}.{name}" if path else name)
    return found


def fingerprint(decoder: nn.Module) -> Fingerprint:
    """Read everything a trace of the decoder would bake in; no device synchronisation."""
    return _fingerprint(decoder, set())


def freeze(value: Any) -> Any:
    """A hashable stand-in for a Python value that the trace bakes in."""
    return _freeze(value, set())


def _fingerprint(decoder: nn.Module, seen: set[int]) -> Fingerprint:
    key: list[Any] = []
    names: list[str] = []
    tensors: list[Tensor] = []
    places: dict[int, int] = {}
    for path, module in modules_with_paths(decoder):
        seen.add(id(module))
        key += (path, module.__class__, module.training)
        prefix = f"{path}." if path else ""
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is None:
                    continue
                place = places.setdefault(id(tensor), len(tensors))
                if place == len(tensors):
                    names.append(prefix + name)
                    tensors.append(tensor)
                key += (name, place, *_signature(tensor))
        skipped = _INTERNAL
        given = (
            *(module._forward_pre_hooks, module._forward_hooks),
            *(module._backward_pre_hooks, module._backward_hooks),
        )
        if any(given):
            hooks = [hook for kind in given for hook in kind.values()]
            key.extend(_freeze(hook, seen) for hook in hooks)
            # The old weight_norm and spectral_norm leave a new weight under this name each time.
            skipped = _INTERNAL.union(getattr(hook, "name", "") for hook in hooks)
        for name, value in module.__dict__.items():
            if name not in skipped:
                # Flat, and without a call for what most attributes are: this runs at every step.
                kind = value.__class__
                key += (name, kind, value if kind in _PLAIN else _freeze(value, seen))
    return Fingerprint(tuple(key), names, tensors)


def _signature(tensor: Tensor) -> tuple:
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)


def _freeze(value: Any, seen: set[int]) -> Any:
    kind = value.__class__
    if kind in _PLAIN:
        # The class tells 2 from 2.0 and from True, which compare equal.
        return (kind, value)
    if isinstance(value, (tuple, list)):
        kinds = tuple(map(type, value))
        if _PLAIN.issuperset(kinds):
            return (kind, kinds, *value)
        return (kind, *[_freeze(item, seen) for item in value])
    if isinstance(value, (set, frozenset)):
        return (kind, frozenset(value))
    if isinstance(value, Tensor):
        # A forward may read the value of a constant; a trained tensor is only computed with.
        version = -1 if value.requires_grad else value._version
        return (WeakIdRef(value), version, *_signature(value))
    if isinstance(value, _OPAQUE):
        return _identity(value)
    if id(value) in seen:
        return id(value)
    seen.add(id(value))
    if isinstance(value, dict):
        return (kind, *[(k, _freeze(v, seen)) for k, v in value.items()])
    if isinstance(value, types.MethodType):
        return (_identity(value.__func__), _freeze(value.__self__, seen))
    if isinstance(value, nn.Module):
        # Outside the module tree, for example in a plain list: its tensors become constants.
        inner = _fingerprint(value, seen)
        return (inner.key, *map(WeakIdRef, inner.tensors))
    if hasattr(value, "tobytes"):
        return (kind, value.tobytes())
    if getattr(value, "__dict__", None):
        return (kind, _freeze(value.__dict__, seen))
    return _identity(value)


def _identity(value: Any) -> Any:
    """Equal for the same object only, and never again once that object is gone."""
    try:
        return WeakIdRef(value)
    except TypeError:
        return (value.__class__, id(value))
