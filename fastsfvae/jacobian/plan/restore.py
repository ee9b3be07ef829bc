"""Run a decoder to be traced without lasting effects, and find out what it writes and draws.

What its forward changes in anything that can be reached from the decoder (attributes, containers,
closures of its hooks, arrays) is as before afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fastsfvae.jacobian.plan.conditions import (
    no_transforms,
    no_warnings_of_torch,
    uncompiled_parts,
)
from fastsfvae.jacobian.plan.fingerprint import modules_with_paths
from fastsfvae.jacobian.plan.freeze import PLAIN, is_surrounding, slot_values, slots_of

# A place below a module: its path, the attribute, then keys, attributes and indices.
Place = tuple[Any, ...]
_LEAVES = (type, types.BuiltinFunctionType, types.ModuleType)
# Looking at these tells nothing of a tensor's values.
_METADATA = frozenset(
    getattr(Tensor, name).__get__
    for name in "shape ndim dtype device layout requires_grad grad_fn is_leaf itemsize".split()
) | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.__len__}


class Effects:
    """What a forward did beside its result.

    Attributes:
        written: places that it wrote tensors to and read none from.
        read: places of tensors that it computed with and that are no parameters or buffers.
    """

    def __init__(self) -> None:
        self.written: list[Place] = []
        self.read: list[Place] = []


@contextlib.contextmanager
def restored(decoder: Callable[..., Any]) -> Iterator[Effects]:
    """Undo what a forward pass writes, and run compiled parts as they were before.

    Raises:
        RuntimeError: the decoder drew random numbers in Python, which a plan would repeat.
    """
    effects, before, reads = Effects(), _Snapshot(decoder), None
    drawn = ""
    with contextlib.ExitStack() as stack:
        stack.enter_context(uncompiled_parts(decoder))
        stack.enter_context(no_transforms(decoder))
        stack.enter_context(no_warnings_of_torch())
        if before.tensors:
            reads = stack.enter_context(_Reads(before.tensors))
        try:
            yield effects
            drawn = before.drawn()
            effects.read = [] if reads is None else [before.tensors[i][1] for i in reads.seen]
            written = before.written()
            effects.written = [w for w in written if not any(_is_in(r, w) for r in effects.read)]
        finally:
            before.restore()
    if drawn:
        raise RuntimeError(
            f"the decoder draws random numbers with {drawn}, which would be the same ones at every "
            "call: draw them outside, and pass them as a tensor"
        )


@contextlib.contextmanager
def undone(decoder: Callable[..., Any]) -> Iterator[None]:
    """Undo what a decoder writes, and nothing else."""
    before = _Snapshot(decoder)
    try:
        yield
    finally:
        before.restore()


def _is_in(place: Place, other: Place) -> bool:
    return place[: len(other)] == other


class _Reads(TorchFunctionMode):
    """Notes which of the given tensors are computed with."""

    def __init__(self, tensors: dict[int, Any]):
        super().__init__()
        self._tensors = tensors
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        """Run one function."""
        if func not in _METADATA:
            self.seen.update(
                id(leaf)
                for leaf in pytree.tree_leaves((args, kwargs))
                if isinstance(leaf, Tensor) and id(leaf) in self._tensors
            )
        return func(*args, **(kwargs or {}))


class _Snapshot:
    """Everything that can be reached from a decoder, and how it was.

    Attributes:
        tensors: those that are no parameters or buffers, and their places, by id.
    """

    def __init__(self, decoder: Callable[..., Any]):
        self.tensors: dict[int, tuple[Tensor, Place]] = {}
        self._records: list[tuple[Any, Place | None, Any]] = []
        self._generators: list[tuple[str, Callable[[], Any], Callable[[Any], None], Any]] = []
        self._seen: dict[int, Any] = {}
        self._pending: list[tuple[Any, Place | None]] = []
        self._note_generator("Python's random", random.getstate, random.setstate)
        if "numpy" in sys.modules:
            state = sys.modules["numpy"].random.mtrand._rand
            self._note_generator("numpy.random", state.get_state, state.set_state)
        if isinstance(decoder, nn.Module):
            for path, module in modules_with_paths(decoder):
                self._visit_module(module, path)
        self._pending.append((decoder, None))
        while self._pending:
            value, place = self._pending.pop()
            if not _is_plain(value) and id(value) not in self._seen:
                self._seen[id(value)] = value
                with contextlib.suppress(Exception):
                    self._visit(value, place)

    def _visit_module(self, module: nn.Module, path: str) -> None:
        self._seen[id(module)] = module
        self._records.append((module.__dict__, (path,), dict(module.__dict__)))
        own = nn.Module.__dict__
        for name, value in reversed(module.__dict__.items()):
            # What a module keeps for itself is no attribute of the decoder's.
            of_decoder = name not in _INTERNAL and name not in own
            self._pending.append((value, (path, name) if of_decoder else None))
        self._pending.append((getattr(type(module), "forward", None), None))

    def _visit(self, value: Any, place: Place | None) -> None:
        if isinstance(value, Tensor):
            if place is not None:
                self.tensors[id(value)] = value, place
        elif isinstance(value, _LEAVES) or is_surrounding(value):
            pass
        elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            self._visit_function(value)
        elif isinstance(value, types.CellType):
            self._records.append((value, None, value.cell_contents))
            self._pending.append((value.cell_contents, None))
        elif isinstance(value, (dict, list, deque, set, bytearray)):
            self._records.append((value, place, _copy(value)))
            self._visit_items(value, place)
        elif isinstance(value, (tuple, frozenset)):
            self._visit_items(value, place)
        elif isinstance(value, weakref.ref):
            self._pending.append((value(), place))
        elif isinstance(value, random.Random):
            self._note_generator("Python's random", value.getstate, value.setstate)
        elif hasattr(value, "tobytes"):
            if getattr(getattr(value, "flags", None), "writeable", False):
                self._records.append((value, None, value.copy()))
        elif isinstance(value, nn.Module):
            self._visit_object(value, None)
        else:
            self._note_numpy(value)
            self._visit_object(value, place)

    def _visit_function(self, value: Any) -> None:
        if isinstance(value, functools.partial):
            parts = [value.func, value.args, value.keywords]
        elif isinstance(value, types.MethodType):
            parts = [value.__func__, value.__self__]
        else:
            parts = [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__]
        self._pending += [(part, None) for part in parts]

    def _visit_items(self, value: Any, place: Place | None) -> None:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in reversed(list(pairs)):
            known = place is not None and type(key) in (str, int)
            self._pending.append((item, (*place, key) if known else None))  # type: ignore[misc]

    def _visit_object(self, value: Any, place: Place | None) -> None:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._records.append((attributes, place, dict(attributes)))
            self._visit_items(attributes, place)
        if slots_of(type(value)):
            slots = slot_values(value)
            self._records.append((value, place, slots))
            self._visit_items(slots, place)

    def _note_numpy(self, value: Any) -> None:
        kind = type(value)
        if kind.__module__.startswith("numpy.random"):
            if hasattr(value, "bit_generator"):
                bits = value.bit_generator
                self._note_generator(
                    f"numpy.random.{kind.__name__}",
                    lambda: bits.state,
                    lambda state: setattr(bits, "state", state),
                )

    def _note_generator(
        self, name: str, get: Callable[[], Any], give: Callable[[Any], None]
    ) -> None:
        self._generators.append((name, get, give, get()))

    def drawn(self) -> str:
        """The name of a random generator that has moved on, or nothing."""
        moved = [name for name, get, _, state in self._generators if not _same(get(), state)]
        return moved[0] if moved else ""

    def written(self) -> list[Place]:
        """Where tensors are now that were not there before."""
        found: list[Place] = []
        for container, place, before in self._records:
            if place is None:
                continue
            if isinstance(container, dict):
                now: dict[Any, Any] = container
            elif isinstance(before, dict):
                now = slot_values(container)
            else:
                if _changed(container, before) and any(map(_holds_tensor, container)):
                    found.append(place)
                continue
            for key, value in now.items():
                new = key not in before or before[key] is not value
                if new and len(place) == 1 and key in _INTERNAL:
                    continue
                if new and _holds_tensor(value):
                    found.append((*place, key) if type(key) is str else place)
        return [place for place in found if len(place) > 1]

    def restore(self) -> None:
        """Put everything back."""
        for container, _, before in self._records:
            with contextlib.suppress(Exception):
                _restore(container, before)
        for _, get, give, state in self._generators:
            if not _same(get(), state):
                give(state)


_INTERNAL = frozenset(nn.Module().__dict__)


def _same(a: Any, b: Any) -> bool:
    return repr(a) == repr(b) if isinstance(a, dict) else _flat(a) == _flat(b)


def _flat(state: Any) -> Any:
    return tuple(x.tobytes() if hasattr(x, "tobytes") else x for x in state)


def _copy(container: Any) -> Any:
    bases: tuple[Callable[[Any], Any], ...] = (dict, list, deque, set, bytearray)
    return next(base for base in bases if isinstance(container, base))(container)  # type: ignore[arg-type]


def _changed(container: Any, before: Any) -> bool:
    return len(container) != len(before) or any(
        a is not b for a, b in zip(container, before, strict=True)
    )


def _restore(container: Any, before: Any) -> None:
    if isinstance(container, types.CellType):
        container.cell_contents = before
    elif isinstance(container, dict):
        now = list(container.items())
        then = list(before.items())
        if len(now) != len(then) or any(
            a is not c or b is not d for (a, b), (c, d) in zip(now, then, strict=True)
        ):
            # Subclasses may refuse to be changed in their own words.
            base = OrderedDict if isinstance(container, OrderedDict) else dict
            base.clear(container)
            for key, value in before.items():
                base.__setitem__(container, key, value)
    elif isinstance(container, (list, bytearray)):
        if _changed(container, before):
            type(before).__setitem__(container, slice(None), before)
    elif isinstance(container, (deque, set)):
        if _changed(container, before):
            container.clear()
            (container.extend if isinstance(container, deque) else container.update)(before)
    elif hasattr(container, "tobytes"):
        if container.tobytes() != before.tobytes():
            container[...] = before
    else:
        for name, slot in slots_of(type(container)).items():
            if name in before:
                slot.__set__(container, before[name])
            else:
                with contextlib.suppress(AttributeError):
                    slot.__delete__(container)


def _is_plain(value: Any) -> bool:
    kind = type(value)
    return type(kind) is type and kind in PLAIN


def _holds_tensor(value: Any, depth: int = 4) -> bool:
    if isinstance(value, Tensor):
        return True
    if depth == 0 or _is_plain(value) or isinstance(value, (nn.Module, *_LEAVES)):
        return False
    if isinstance(value, dict):
        inside: Any = value.values()
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        inside = value
    else:
        inside = (getattr(value, "__dict__", None) or {}).values()
    return any(_holds_tensor(item, depth - 1) for item in inside)
