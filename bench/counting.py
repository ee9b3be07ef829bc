"""Counting what a step launches on a GPU, without one: kernels, copies and fills."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

# What only allocates, or gives a tensor another shape.
_FREE = frozenset(
    "empty new_empty empty_like empty_strided new_empty_strided detach alias view _unsafe_view "
    "reshape expand permute transpose t select slice unsqueeze squeeze unbind split as_strided "
    "view_as unflatten promote_types diagonal lift_fresh _reshape_alias chunk narrow unfold".split()
)


# Told of each of PyTorch's launches: the operation, its arguments and its result.
Told = Callable[[Any, Any, Any], None]
# Makes such a launch: given the operation, its arguments, and what makes it and gives its result.
Around = Callable[[Any, Any, Callable[[], Any]], Any]


class LibraryCalls(TorchDispatchMode):
    """Has each of PyTorch's launches made by ``around``, those inside this library's operators too.

    Within `constants_kept`, as a plain step would.
    """

    def __init__(self, around: Around):
        super().__init__()
        self._around = around

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastsfvae":
            # What an operator of this library calls is counted, not the operator.
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        if func.namespace != "aten":
            return func(*args, **(kwargs or {}))
        with self:
            # What is made of others, and may launch nothing.
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        given = args, kwargs or {}
        if func.overloadpacket.__name__ in _FREE:
            return func(*given[0], **given[1])
        return self._around(func, given, lambda: func(*given[0], **given[1]))


def constants_kept() -> Any:
    """Constants are kept outside of dispatch modes only: inside, as if there was none."""
    kept = "fastsfvae._constants._get_current_dispatch_mode"
    return mock.patch(kept, return_value=None)


@contextmanager
def counted_launches(*, skip_kernels: bool = True, told: Told | None = None):
    """Count by name, inside, what autograd's and PyTorch's calls and Triton's kernels launch.

    Args:
        skip_kernels: do not run the Triton kernels, whose results are then whatever memory held: at
            a workload's size the interpreter takes hours.
        told: called for each of PyTorch's.
    """
    counts: Counter[str] = Counter()
    run = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts[self.fn.__name__] += 1
        return None if skip_kernels else run(self, *args, **kwargs)

    def around(func: Any, given: Any, go: Callable[[], Any]) -> Any:
        counts[func.overloadpacket.__name__] += 1
        result = go()
        if told is not None:
            told(func, given, result)
        return result

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", launch))
        stack.enter_context(constants_kept())
        stack.enter_context(LibraryCalls(around))
        yield counts
