"""A tape of the rules that ran, and their adjoints in reverse order.

It takes autograd's place inside a sweep, where gradients of a chunk are finished while its tangents
exist: one entry per operation on Jets, not one per tensor operation, and nothing of torch.autograd,
which cannot run inside a torch.library operator.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastsfvae._ranges import span
from fastsfvae.jacobian.rules.jet import Jet, cast, flat, is_list
from fastsfvae.jacobian.rules.rule import Rule

if TYPE_CHECKING:
    from fastsfvae.ops.partial_sums import PartialSums

_running = threading.local()


def current_tape() -> Tape | None:
    """The tape that records this thread's rules, if any; none while one of them runs."""
    tape = getattr(_running, "tape", None)
    return None if tape is None or tape.busy else tape


def once(
    tensor: Tensor,
    name: str,
    function: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """`function(tensor)`, computed once in a tape's life, for what no sample changes.

    With an `adjoint`, (tensor, gradient of the result) -> gradient of the tensor, gradients of the
    result are added up over all that is pulled, and go through it once (`Tape.finish`).
    """
    tape = getattr(_running, "tape", None)
    return function(tensor) if tape is None else tape.once(tensor, name, function, adjoint)


def provide(
    tensors: Sequence[Tensor], name: str, function: Callable[[Sequence[Tensor]], list[Tensor]]
) -> None:
    """Compute for several tensors together what `once` is going to be asked for of each.

    Nothing outside of a tape, nor where the tape has it.
    """
    tape = getattr(_running, "tape", None)
    if tape is not None:
        tape.provide(tensors, name, function)


def running_sums() -> PartialSums | None:
    """Those of the tape that runs; an adjoint gives `SUMMED` for what it leaves there."""
    tape = getattr(_running, "tape", None)
    return None if tape is None else tape.sums


def room_of(source: Jet) -> Tensor | None:
    """Where the gradient of a stack that nothing else reads is to go, if that was said."""
    tape = getattr(_running, "tape", None)
    return None if tape is None else tape.into.get(id(source))


class _Summed:
    """Stands for a gradient whose parts lie in `running_sums`."""


SUMMED = _Summed()


class _Entry(NamedTuple):
    rule: Rule
    args: tuple
    kwargs: dict[str, Any]
    out: Any
    label: str


class Recorded(NamedTuple):
    """What a tape has recorded, and whose gradients that leads to."""

    entries: list[_Entry]
    active: set[int]


class _Gradient(NamedTuple):
    value: Any
    # Whether nothing else refers to its memory.
    owned: bool


class Tape:
    """Records rules while it is entered; `pull` gives the gradients.

    Args:
        wanted: the tensors whose gradients are wanted; they must outlive the tape.
        beside: another tape of the same sweep: what either has computed once, the other need not.
    """

    def __init__(self, wanted: Iterable[Tensor], beside: Tape | None = None):
        self._wanted = list(wanted)
        # Those that are wanted no more.
        self._left: set[int] = set()
        self._entries: list[_Entry] = []
        self._gradients: dict[int, _Gradient] = {}
        # By tensor and name; the tensor is kept beside its result, so that its id stays its own.
        self._fixed: dict[Any, tuple[Tensor, Tensor]] = {} if beside is None else beside._fixed
        self._once: dict[Any, tuple[Tensor, Tensor]] = {}
        self._sums: PartialSums | None = None
        self._derived: list[tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]] = []
        # Memory for gradients, by their sources' ids.
        self.into: dict[int, Tensor] = {}
        # Whether a rule runs, which may call others.
        self.busy = False
        self._forget()

    def __enter__(self) -> Tape:
        """Start recording."""
        self._outer = getattr(_running, "tape", None)
        _running.tape = self
        return self

    def __exit__(self, *_: Any) -> None:
        """Stop recording."""
        _running.tape = self._outer

    @property
    def sums(self) -> PartialSums:
        """Parts of gradients that are added up at the end."""
        if self._sums is None:
            # Late: only fused layers leave any.
            from fastsfvae.ops.partial_sums import PartialSums

            self._sums = PartialSums(self._needs)
        return self._sums

    def activate(self, source: Jet | Tensor, into: Tensor | None = None) -> None:
        """Ask for a gradient once; the caller keeps the source until it has taken it.

        Args:
            source: whose gradient is wanted.
            into: memory for that of its stack, where an adjoint can store it there (`room_of`).
        """
        self._active.add(id(source))
        if into is not None:
            self.into[id(source)] = into

    def leave(self, tensors: Iterable[Tensor]) -> None:
        """Want no gradient of these any more."""
        self._left |= set(map(id, tensors))
        self._wanted = [t for t in self._wanted if id(t) not in self._left]
        self._active -= self._left

    def once(
        self,
        tensor: Tensor,
        name: str,
        function: Callable[[Tensor], Tensor],
        adjoint: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """See the function of that name."""
        key = id(tensor), name
        # Gradients of a result are this tape's own.
        known = self._fixed if adjoint is None else self._once
        if key not in known:
            known[key] = function(tensor), tensor
            if adjoint is not None and self._needs(tensor):
                result = known[key][0]
                self._wanted.append(result)
                self._active.add(id(result))
                self._derived.append((tensor, result, adjoint))
        return known[key][0]

    def provide(
        self,
        tensors: Sequence[Tensor],
        name: str,
        function: Callable[[Sequence[Tensor]], list[Tensor]],
    ) -> None:
        """See the function of that name."""
        new = [t for t in tensors if (id(t), name) not in self._fixed]
        for tensor, result in zip(new, function(new) if new else [], strict=True):
            self._fixed[id(tensor), name] = result, tensor

    def record(
        self,
        rule: Rule,
        function: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        label: str,
        skip: int = 0,
    ) -> Any:
        """Call `function(*args, **kwargs)` for a rule whose own arguments begin at `skip`."""
        if rule.composed:
            return function(*args, **kwargs)
        self.busy = True
        try:
            out = function(*args, **kwargs)
        finally:
            self.busy = False
        args = args[skip:]
        if rule.adjoint is not None and any(self._needs(arg) for arg in flat(args)):
            results = out if is_list(out) else (out,)
            # A lone tensor is a value that leaves the Jets; beside one it is a position.
            kinds = (Jet,) if is_list(out) else (Jet, Tensor)
            fresh = [r for r in results if isinstance(r, kinds) and id(r) not in self._active]
            if fresh:
                self._active.update(map(id, fresh))
                self._entries.append(_Entry(rule, args, kwargs, out, label))
        return out

    def pull(self, out: Jet, grad: Jet) -> None:
        """Run the adjoints from `out` to everything wanted; forgets what was recorded.

        Args:
            out: a result of a recorded rule, or an activated Jet.
            grad: its gradient, which may be overwritten.
        """
        if id(out) in self._active:
            self._gradients[id(out)] = _Gradient(_reduced(grad, out), owned=True)
        while self._entries:
            entry = self._entries.pop()
            gradient = self._of(entry.out)
            if gradient is None:
                continue
            if entry.rule.overwrites and not gradient.owned:
                gradient = _Gradient(_copy(gradient.value), owned=True)
            needs = tuple(
                [self._needs(item) for item in arg] if is_list(arg) else self._needs(arg)
                for arg in entry.args
            )
            assert entry.rule.adjoint is not None
            with span(entry.label, "backward"):
                results = entry.rule.adjoint(
                    gradient.value, entry.out, needs, *entry.args, **entry.kwargs
                )
            # An adjoint may leave out trailing arguments, and name some that were not given.
            results = (*results, *[None] * len(needs))[: len(needs)]
            # The only one that is handed on, of memory that was the gradient's alone.
            alone = gradient.owned and sum(result is not None for result in results) == 1
            for arg, need, result in zip(entry.args, needs, results, strict=True):
                if isinstance(need, list):
                    result = [None] * len(need) if result is None else result
                    for item, wanted, part in zip(arg, need, result, strict=True):
                        self._give(entry.rule, item, wanted, part, entry.rule.fresh)
                else:
                    fresh = entry.rule.fresh or (alone and _share(result, gradient.value))
                    self._give(entry.rule, arg, need, result, fresh)
        self._forget()

    def put_aside(self) -> Recorded:
        """Take out what was recorded, to be pulled later; the tape is then as before it."""
        recorded = Recorded(self._entries, self._active)
        self._entries = []
        self._forget()
        return recorded

    def take_up(self, recorded: Recorded) -> None:
        """Put back what was taken out, in place of what is recorded."""
        self._entries, self._active = recorded.entries, recorded.active - self._left

    def add(self, tensor: Tensor, gradient: Tensor) -> None:
        """Count a gradient that no rule gave, in memory that nothing else refers to."""
        if self._needs(tensor):
            self._add(tensor, gradient, fresh=True)

    def finish(self) -> None:
        """Add up parts of sums, and pull what was computed `once` back to what it is made of."""
        for tensor, gradient in self._sums.add_up() if self._sums else ():
            self.add(tensor, gradient)
        for tensor, result, adjoint in self._derived:
            gradient = self.take(result)
            if gradient is not None:
                self.add(tensor, adjoint(tensor, gradient))

    def take(self, source: Tensor | Jet) -> Any:
        """The gradient of an activated Jet or a wanted tensor, None where it is zero; once."""
        gradient = self._gradients.pop(id(source), None)
        self.into.pop(id(source), None)
        return None if gradient is None else gradient.value

    def _forget(self) -> None:
        # By identity: whatever is in here is kept alive by the entries or by the caller.
        self._active = {id(tensor) for tensor in self._wanted}
        self._entries.clear()

    def _needs(self, value: Any) -> bool:
        return isinstance(value, (Tensor, Jet)) and id(value) in self._active

    def _of(self, out: Any) -> _Gradient | None:
        if isinstance(out, (Jet, Tensor)):
            return self._gradients.pop(id(out), None)
        parts = tuple(self.take(part) for part in out)
        return None if all(part is None for part in parts) else _Gradient(parts, owned=False)

    def _give(self, rule: Rule, source: Any, wanted: bool, gradient: Any, fresh: bool) -> None:
        if not wanted or gradient is SUMMED:
            return
        if gradient is None:
            raise RuntimeError(f"the adjoint of {rule.name} lacks a gradient: please report it")
        self._add(source, gradient, fresh)

    def _add(self, source: Any, gradient: Any, fresh: bool) -> None:
        given, gradient = gradient, _reduced(gradient, source)
        before = self._gradients.get(id(source))
        if before is not None:
            gradient, fresh = _sum(before.value, gradient), True
        elif gradient is given and isinstance(given, Tensor) and not fresh:
            # It leaves the sweep, whose results may not share memory.
            gradient, fresh = given.clone(), True
        self._gradients[id(source)] = _Gradient(gradient, fresh)


def _copy(grad: Any) -> Any:
    if not isinstance(grad, Jet):
        return grad
    if grad.stack is not None:
        stack = grad.stack.clone()
        return Jet(stack[0], stack[1:], stack)
    return Jet(grad.primal.clone(), grad.tangent.clone())


def _share(a: Any, b: Any) -> bool:
    """Whether two stacks lie in the same memory."""
    stacks = [t.stack for t in (a, b) if isinstance(t, Jet) and t.stack is not None]
    return len(stacks) == 2 and stacks[0].data_ptr() == stacks[1].data_ptr()


def _sum(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor):
        return a + b
    if a.stack is not None and b.stack is not None:
        stack = a.stack + b.stack
        return Jet(stack[0], stack[1:], stack)
    return Jet(a.primal + b.primal, a.tangent + b.tangent)


def _reduced(gradient: Any, source: Any) -> Any:
    """Sum over what was broadcast, and cast to the source's dtype.

    The gradient of a complex value is that by its real part plus i times that by its imaginary
    one: that of a real value is the real part of it.
    """
    if isinstance(source, Tensor):
        return cast(sum_to(gradient, source.shape), source.dtype)
    primal, tangent = gradient.primal, gradient.tangent
    shape = source.tangent.shape
    extra = tangent.ndim - len(shape)
    if extra > 0:
        # Axes that the value lacks were inserted behind the tangents' own.
        tangent = tangent.sum(list(range(1, 1 + extra)))
    same = primal.shape == source.primal.shape and tangent.shape == shape
    if same and extra <= 0 and primal.dtype == source.primal.dtype == tangent.dtype:
        return gradient
    if same and extra <= 0 and gradient.stack is not None:
        stack = cast(gradient.stack, source.primal.dtype)
        return Jet(stack[0], stack[1:], stack)
    dtype = source.primal.dtype
    primal, tangent = sum_to(primal, source.primal.shape), sum_to(tangent, shape)
    return Jet(cast(primal, dtype), cast(tangent, dtype))


def sum_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Undo a broadcast from `shape`."""
    return gradient if gradient.shape == shape else gradient.sum_to_size(shape)
