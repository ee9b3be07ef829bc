"""Hashable stand-ins for Python values that a trace bakes in.

What has a value of its own is known by it (numbers, containers, arrays, objects by their
attributes); everything else (functions, classes, generators, locks) by its identity. Nothing here
raises, whatever a decoder's attributes are.
"""

from __future__ import annotations

import enum
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device})
# Those that are equal only where nothing tells them apart: 0.0 equals -0.0, and nan not itself.
EXACT = PLAIN - {float, complex}
OPAQUE = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
# The values of what is derived from a plain type, as the type itself sees them.
_BASES: dict[type, Callable[[Any], Any]] = {
    int: int.__pos__,
    float: float.__pos__,
    complex: complex.__pos__,
    str: lambda value: str.__getitem__(value, slice(None)),
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
}
# Where types live whose text tells all of a value.
_SPELLED = frozenset("datetime decimal fractions ipaddress pathlib pathlib._local uuid".split())
# Where types live that are a program's surroundings, which change and say nothing of a decoder.
_SURROUNDINGS = frozenset(
    "_io _thread asyncio concurrent io logging multiprocessing threading".split()
)
# Lengths up to here are told apart in what grows at each call.
_FEW = 4


def is_surrounding(value: Any) -> bool:
    """Whether it is a logger, lock, thread, file or optimizer: known by identity, left alone."""
    root = str(type(value).__module__).partition(".")[0]
    return root in _SURROUNDINGS or isinstance(value, torch.optim.Optimizer)


def signature(tensor: Tensor) -> tuple:
    """What is known of a tensor without its values."""
    try:
        stride: Any = tensor.stride()
    except RuntimeError:
        # Sparse ones have none.
        stride = tensor.layout
    return (tensor.shape, stride, tensor.dtype, tensor.device, tensor.requires_grad)


_slots: weakref.WeakKeyDictionary[type, dict[str, Any]] = weakref.WeakKeyDictionary()


def slots_of(kind: type) -> dict[str, Any]:
    """The descriptors of a class's slots, by their names."""
    found = _slots.get(kind)
    if found is None:
        places = [place for base in kind.__mro__ for place in vars(base).items()]
        slots = [(n, slot) for n, slot in places if type(slot) is types.MemberDescriptorType]
        found = {name: slot for name, slot in slots if name != "__dict__"}
        _slots[kind] = found
    return found


def slot_values(value: Any) -> dict[str, Any]:
    """What the slots of an object hold."""
    found: dict[str, Any] = {}
    for name, slot in slots_of(type(value)).items():
        try:
            found[name] = slot.__get__(value)
        except AttributeError:
            continue
    return found


class Freezer:
    """Makes stand-ins of the values of one decoder; cycles and shared parts are met once.

    Args:
        modules: those of the decoder, which are known by their place.
        fingerprint: the key and tensors of a module that is outside the decoder's tree.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        fingerprint: Callable[[nn.Module, Freezer], tuple[tuple, list[Tensor]]],
    ):
        # Nothing that was met may die on the way, as another value would get its id.
        self._met: list[Any] = list(modules)
        self._places = {id(module): place for place, module in enumerate(self._met)}
        self._fingerprint = fingerprint

    def meet(self, value: Any) -> int | None:
        """The place of a value that was met before; None, and one from now on, where it was not."""
        place = self._places.setdefault(id(value), len(self._met))
        if place < len(self._met):
            return place
        self._met.append(value)
        return None

    def freeze(self, value: Any, written: Any = None) -> Any:
        """The stand-in of a value.

        Args:
            value: anything.
            written: True where the decoder's forward writes tensors there and reads none of them;
                a dictionary where it does so further inside, by key, attribute or index.
        """
        kind = type(value)
        # Of another metaclass there may be no hash.
        if type(kind) is type:
            if kind in EXACT:
                # The class tells 2 from 2.0 and from True, which compare equal.
                return (kind, value)
            if kind in PLAIN:
                return (kind, repr(value))
        try:
            if kind is tuple or kind is list:
                kinds = tuple(map(type, value))
                if EXACT.issuperset(kinds):
                    return (kind, kinds, *value)
            return self._freeze(value, kind, written)
        except Exception:
            # Attributes may be objects that raise wherever they are looked at.
            return identity(value)

    def _freeze(self, value: Any, kind: type, written: Any) -> Any:
        if isinstance(value, Tensor):
            return _tensor(value, written is True)
        if issubclass(kind, (tuple, list, deque)):
            return self._items(value, kind, written)
        if isinstance(value, OPAQUE) or is_surrounding(value):
            return identity(value)
        for base, plain in _BASES.items():
            if issubclass(kind, base):
                name = value.name if issubclass(kind, enum.Enum) else None
                return (_kind(kind), name, self.freeze(plain(value)), self._state(value))
        if issubclass(kind, enum.Enum):
            return (_kind(kind), value.name, self.freeze(value.value))
        if kind.__module__ in _SPELLED:
            return (kind, repr(value))
        place = self.meet(value)
        if place is not None:
            return ("met", place)
        if isinstance(value, nn.Module):
            # Outside the module tree, for example in a plain list: its tensors become constants.
            key, tensors = self._fingerprint(value, self)
            return (key, *(_tensor(tensor, False) for tensor in tensors))
        return self._by_parts(value, kind, written)

    def _items(self, value: Any, kind: type, written: Any) -> Any:
        place = self.meet(value)
        if place is not None:
            return ("met", place)
        if written is True:
            parts: Any = tuple(self.freeze(item, True) for item in value)
            if not issubclass(kind, tuple):
                parts = _grown(parts)
        else:
            parts = tuple(self.freeze(x, _inside(written, i)) for i, x in enumerate(value))
        return (_kind(kind), parts, getattr(value, "maxlen", None), self._state(value))

    def _by_parts(self, value: Any, kind: type, written: Any) -> Any:
        known = _kind(kind)
        if isinstance(value, (dict, types.MappingProxyType)):
            factory = self.freeze(getattr(value, "default_factory", None))
            return (known, *self._mapping(value, written), factory, self._state(value))
        if isinstance(value, (set, frozenset)):
            return (known, frozenset(self.freeze(x, written) for x in value), self._state(value))
        if isinstance(value, types.MethodType):
            return (identity(value.__func__), self.freeze(value.__self__))
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return (known, *map(self.freeze, parts), self._state(value))
        if isinstance(value, weakref.ref):
            return (known, self.freeze(value()))
        if isinstance(value, (slice, range)):
            return (kind, *map(self.freeze, (value.start, value.stop, value.step)))
        if isinstance(value, bytearray):
            return (known, bytes(value), self._state(value))
        if hasattr(value, "tobytes"):
            return (known, *self._array(value), self._state(value))
        state = self._state(value, written)
        return identity(value) if state is None else (known, state)

    def _mapping(self, value: Mapping[Any, Any], written: Any) -> list[Any]:
        pairs = [
            # Keys other than names may be counted up, as the items of a list are.
            (type(k) if written is True and type(k) is not str else self.freeze(k), v, k)
            for k, v in value.items()
        ]
        if written is True:
            return [_grown([(key, self.freeze(v, True)) for key, v, _ in pairs])]
        return [(key, self.freeze(v, _inside(written, k))) for key, v, k in pairs]

    def _array(self, value: Any) -> tuple:
        dtype = getattr(value, "dtype", None)
        if getattr(dtype, "hasobject", False):
            items = value.tolist()
            self._met.append(items)
            return (value.shape, self.freeze(items))
        about = [getattr(value, name, None) for name in ("shape", "strides", "typecode", "mode")]
        return (str(dtype), *map(self.freeze, about), value.tobytes())

    def _state(self, value: Any, written: Any = None) -> Any:
        """The attributes of an object in its dictionary and its slots, or None."""
        attributes = getattr(value, "__dict__", None) or {}
        slots = slot_values(value) if slots_of(type(value)) else {}
        if not attributes and not slots:
            return None
        return tuple(self._mapping({**attributes, **slots}, written))


def _tensor(tensor: Tensor, written: bool) -> tuple:
    if written:
        return (tensor.shape, tensor.dtype, tensor.device)
    # A forward may read the value of a constant; a trained tensor is only computed with. An
    # inference tensor counts no changes.
    counted = not (tensor.requires_grad or tensor.is_inference())
    return (WeakIdRef(tensor), tensor._version if counted else -1, *signature(tensor))


def _grown(parts: Sequence[Any]) -> tuple:
    # It grows at each call, and a forward may ask whether it holds a few.
    return (min(len(parts), _FEW), frozenset(parts))


def _inside(written: Any, key: Any) -> Any:
    if not written or written is True or type(key) not in (str, int):
        return written if written is True else None
    return written.get(key)


def _kind(kind: type) -> Any:
    # A metaclass may compare as it likes.
    return kind if type(kind) is type else identity(kind)


class _Same:
    """Equal for the same object only, and never again once that object is gone."""

    __slots__ = ("_id", "_reference")

    def __init__(self, reference: Callable[[], Any], number: int):
        self._reference = reference
        self._id = number

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, _Same):
            return False
        value = self._reference()
        return value is not None and value is other._reference()


def identity(value: Any) -> Any:
    """What is equal for this object only: refers weakly to it where it can."""
    try:
        reference: Callable[[], Any] = weakref.ref(value)
    except TypeError:
        reference = functools.partial(_given, value)
    return _Same(reference, id(value))


def _given(value: Any) -> Any:
    return value
