"""Values that no sample changes, at hand while a decoder is traced.

Where a decoder asks for the value of a buffer, a constant or a parameter, or of what is computed
from them (an attention mask, a flag, the places that a boolean mask selects), it is traced once
more with these as they are. Whatever depends on the batch stays without data. The plan is then
right for those values only, see `fastsfvae.jacobian.plan.asked`.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastsfvae.jacobian.plan.refuse import layer_name

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
aten = torch.ops.aten
# Their positions are values: a mask stands for those where it holds.
_INDEXED = frozenset({aten.index.Tensor, aten.index_put.default, aten.index_put_.default})


class WrittenConstant(RuntimeError):
    """A value that was known has become one that depends on the batch."""


class KnownValues(TorchDispatchMode):
    """Runs what depends on the batch without data, and everything else as it is.

    Args:
        mode: of the tensors without data.
        sources: tensors whose values may be asked for, to be changed by no operation of the user's.
        made: whether the values of what the decoder makes of numbers alone are known as well.

    Raises:
        WrittenConstant: what depends on the batch is written into what does not.
    """

    def __init__(self, mode: FakeTensorMode, sources: Sequence[Tensor], made: bool = True):
        super().__init__()
        self._mode, self._made = mode, made
        # The sources that a value is computed from, by its memory.
        self._origins = {_memory(t): frozenset({i}) for i, t in enumerate(sources)}
        self.asked: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        """Run one operation."""
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        known = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, FakeTensor)]
        origins = frozenset[int]().union(*(self._origins.get(_memory(t), ()) for t in known))
        if any(isinstance(x, (FakeTensor, *_SYMBOLS)) for x in leaves):
            if func is aten.equal.default and _differ_in_shape(*args):
                return False
            changed = _changed(func, args)
            if changed is not None and not isinstance(changed, FakeTensor):
                raise WrittenConstant(
                    f"the decoder writes what depends on the batch into a constant with {func} "
                    "where values are asked for: write into torch.zeros_like of what it writes"
                )
            if func in _INDEXED and any(map(_is_mask, known)):
                self.asked |= origins
                args = (args[0], _positions(args[1]), *args[2:])
            with self._mode:
                return func(*args, **kwargs)
        if not known and not self._made:
            with self._mode:
                return func(*args, **kwargs)
        changed = _changed(func, args)
        if changed is not None and _memory(changed) not in self._origins:
            raise RuntimeError(
                f"the decoder changes a constant in place with {func} where its values are asked "
                "for: register it as a buffer"
            )
        out = func(*args, **kwargs)
        results = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        if not results or torch.Tag.dynamic_output_shape in func.tags:
            self.asked |= origins
        for result in results:
            self._origins[_memory(result)] = origins
        return out


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _changed(func: Any, args: tuple) -> Any:
    """The tensor that an operation writes into, or None."""
    target = args[0] if args and func._schema.is_mutable else None
    return target if isinstance(target, Tensor) else None


def _differ_in_shape(a: Tensor, b: Tensor) -> bool:
    sizes = zip(a.shape, b.shape, strict=False)
    known = [(m, n) for m, n in sizes if isinstance(m, int) and isinstance(n, int)]
    return a.ndim != b.ndim or any(m != n for m, n in known)


def _is_mask(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bool, torch.uint8)


def _positions(indices: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for index in indices:
        mask = index is not None and not isinstance(index, FakeTensor) and _is_mask(index)
        found += index.nonzero().unbind(1) if mask else [index]
    return found


def value_asked_for(error: BaseException, path: str) -> str:
    """The line that refuses a decoder which asks for a value that depends on the batch.

    Args:
        error: raised by the operation that lacks the value.
        path: of the module that ran.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(part in f.filename for part in _FOREIGN)]
    place = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
    if any("/torch/distributions/" in f.filename for f in frames):
        way_out = (
            "a distribution checks its arguments: return its mean, a tensor, or pass it "
            "validate_args=False"
        )
    elif isinstance(error, DynamicOutputShapeException):
        way_out = "use torch.where, or a fixed number of entries"
    else:
        way_out = "use torch.where in place of a branch, and tensors in place of Python numbers"
    return (
        f"{layer_name(path)} asks for a value, or has a shape, that depends on the values of "
        f"its inputs{place}, which cannot be traced: {way_out}"
    )


# Files that are neither the decoder's nor the user's.
_FOREIGN = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))
