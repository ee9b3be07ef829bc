"""What a traced plan depends on: everything the trace bakes in, as one hashable key.

A plan holds the decoder's Python-level decisions as constants: its structure, training flags and
plain attributes, the shapes and dtypes of parameters. The key is rebuilt at every call, so that
changing `decoder.scale = 2.0` or calling `decoder.train()` leads to a new plan. Python globals,
closures and class attributes that a forward method reads are beyond it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from fastsfvae.jacobian.plan.freeze import EXACT, Freezer, signature
from fastsfvae.jacobian.validate import layer_name, uncompiled

# Attributes that nn.Module keeps for itself; `training` and the tensors are read separately.
_INTERNAL = frozenset({*nn.Module().__dict__, "_compiled_call_impl"})


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


# For each module's path, what its forward writes and does not read (see `Freezer.freeze`).
Written = Mapping[str, Mapping[str, Any]]


def modules_with_paths(module: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """All submodules depth first, shared ones once per place; compiled ones as they were.

    Raises:
        RuntimeError: names a scripted module, which cannot be traced.
    """
    if isinstance(module, ScriptModule):
        raise RuntimeError(
            f"{layer_name(path)} is a torch.jit module, whose operations no trace sees: use the "
            "nn.Module that it was made from"
        )
    if "_orig_mod" in module._modules:
        module = uncompiled(module)
    found = [(path, module)]
    for name, child in module._modules.items():
        if child is not None:
            found += modules_with_paths(child, f"{path}.{name}" if path else name)
    return found


def fingerprint(
    decoder: nn.Module, written: Written | None = None, lifted: Collection[tuple] = ()
) -> Fingerprint:
    """Read everything a trace of the decoder would bake in; no device synchronisation.

    Args:
        decoder: the module.
        written: attributes that are results and no inputs.
        lifted: numbers that are inputs of a plan, as pairs (path, attribute).
    """
    modules = modules_with_paths(decoder)
    freezer = Freezer((m for _, m in modules), _outside)
    try:
        return _fingerprint(modules, freezer, written or {}, lifted)
    except (RuntimeError, ValueError):
        _refuse_lazy(modules)
        raise


def freeze(value: Any) -> Any:
    """A hashable stand-in for a Python value that the trace bakes in."""
    return Freezer((), _outside).freeze(value)


def attributes(decoder: nn.Module, written: Written | None = None) -> dict[str, tuple[Any, str]]:
    """A decoder's plain attributes that are no results, by their names: (stand-in, text)."""
    modules = modules_with_paths(decoder)
    freezer = Freezer((m for _, m in modules), _outside)
    found: dict[str, tuple[Any, str]] = {}
    for path, module in modules:
        results = (written or {}).get(path, {})
        for name, value in module.__dict__.items():
            if name not in _INTERNAL and name not in results:
                stand_in = freezer.freeze(value)
                found[f"{layer_name(path)}.{name}"] = stand_in, text_of(value)
    return found


def plain_attributes(decoder: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The numbers, strings and flags among a decoder's attributes: (dotted name, value)."""
    found: list[tuple[str, Any]] = []
    for path, module in modules_with_paths(decoder):
        prefix = f"{path}." if path else ""
        for name, value in module.__dict__.items():
            # A nan is no value that anything equals.
            kept = any(type(value) is kind for kind in (bool, int, float, str)) and value == value
            if kept and (name not in _INTERNAL or name == "training"):
                found.append((prefix + name, value))
    return tuple(found)


def text_of(value: Any) -> str:
    """A value in a message."""
    return repr(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"


def _outside(module: nn.Module, freezer: Freezer) -> tuple[tuple, list[Tensor]]:
    modules = modules_with_paths(module)
    for _, inside in modules:
        freezer.meet(inside)
    inner = _fingerprint(modules, freezer, {})
    return inner.key, inner.tensors


def _fingerprint(
    modules: list[tuple[str, nn.Module]],
    freezer: Freezer,
    written: Written,
    lifted: Collection[tuple] = (),
) -> Fingerprint:
    key: list[Any] = []
    names: list[str] = []
    tensors: list[Tensor] = []
    places: dict[int, int] = {}
    for path, module in modules:
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
                key += (name, place, *signature(tensor))
        skipped = _INTERNAL
        given = (
            *(module._forward_pre_hooks, module._forward_hooks),
            *(module._backward_pre_hooks, module._backward_hooks),
        )
        if any(given):
            hooks = [hook for kind in given for hook in kind.values()]
            key.extend(map(freezer.freeze, hooks))
            # The old weight_norm and spectral_norm leave a new weight under this name each time.
            skipped = _INTERNAL.union(str(getattr(hook, "name", "")) for hook in hooks)
        results = written.get(path, {})
        for name, value in module.__dict__.items():
            if name not in skipped:
                # Flat, and without a call for what most attributes are: this runs at every step.
                kind = type(value)
                if lifted and (path, name) in lifted:
                    key += (name, kind, None)
                elif type(kind) is type and (
                    kind in EXACT or (kind is float and (value < 0 or value > 0))
                ):
                    key += (name, kind, value)
                else:
                    key += (name, freezer.freeze(value, results.get(name)))
    return Fingerprint(tuple(key), names, tensors)


def _refuse_lazy(modules: list[tuple[str, nn.Module]]) -> None:
    for path, module in modules:
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(tensor is not None and is_lazy(tensor) for tensor in tensors):
            raise RuntimeError(
                f"the parameters of {layer_name(path)} have no shape yet (a lazy module): call "
                "the decoder once, then make its optimizer"
            )
