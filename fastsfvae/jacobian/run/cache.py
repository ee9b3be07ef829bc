"""Run a decoder with its tangents: the plans' cache, validation and chunks of samples."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from fastsfvae.jacobian.plan.asked import Asked, NumberAsked
from fastsfvae.jacobian.plan.fingerprint import (
    Fingerprint,
    Written,
    attributes,
    fingerprint,
    freeze,
    text_of,
)
from fastsfvae.jacobian.rules.registry import RULES
from fastsfvae.jacobian.run.history import History
from fastsfvae.jacobian.run.numbers import Place, number_tensor, numbers_of, put_numbers
from fastsfvae.jacobian.validate import Derived, check_inputs, unwrap
from fastsfvae.ops import dispatch

# Plans per decoder; more than a training loop needs, few enough that a key which changes at every
# call cannot fill the memory.
_MAX_PLANS = 32
# Bytes of tangents that one chunk may hold; on a GPU a share of its memory, the same at every call
# so that the same batch is always cut the same way.
_CPU_BUDGET = 256 * 2**20
_CUDA_SHARE = 8

# Held while a trace has its stand-ins in a decoder's modules: no other thread reads those then.
_tracing = threading.RLock()
_NO_INPUTS = pytree.tree_flatten(((), {}))
# By the decoder's id, until it dies. A dictionary of weak keys would do, but a compiler that looks
# into one knows a key by its place, which moves when another decoder dies.
_plans: dict[int, dict[Any, list[Any]]] = {}
_histories: dict[int, History] = {}


def chunk_bounds(batch: int, size: int) -> Iterator[tuple[int, int]]:
    """Bounds of near-equal chunks of at most `size` samples."""
    count = -(-batch // max(1, min(size, batch)))
    base, longer = divmod(batch, count)
    start = 0
    for index in range(count):
        stop = start + base + (index < longer)
        yield start, stop
        start = stop


def _fingerprint_of(
    decoder: nn.Module, written: Written, lifted: Collection[Place] = ()
) -> Fingerprint:
    if torch.compiler.is_compiling():
        # A compiler cannot follow a lock.
        return fingerprint(decoder, written, lifted)
    with _tracing:
        return fingerprint(decoder, written, lifted)


def _history_of(home: nn.Module) -> History:
    if id(home) not in _histories:
        weakref.finalize(home, _forget, id(home))
        _histories[id(home)] = History()
    return _histories[id(home)]


def _forget(number: int) -> None:
    _plans.pop(number, None)
    _histories.pop(number, None)


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


class Linearizer:
    """A decoder prepared for one batch; `chunks` and `run` evaluate it.

    Args:
        decoder: an nn.Module or a callable, called as decoder(z, *args, **kwargs).
        z: [B, m].
        args: further positional arguments; tensors with leading extent B go with their samples.
        kwargs: further keyword arguments, likewise.
        backend: "torch" or "triton", already resolved.
        lift: whether numbers that change from call to call may become inputs of a plan.

    Raises:
        TypeError, ValueError, RuntimeError: see `decode_with_jacobian`.
    """

    def __init__(
        self,
        decoder: Callable[..., Tensor],
        z: Tensor,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        lift: bool = True,
    ):
        self.decoder, kwargs = unwrap(decoder, kwargs)
        self.z, self.backend = z, backend
        leaves, self._spec = _NO_INPUTS
        if args or kwargs:
            leaves, self._spec = pytree.tree_flatten((tuple(args), kwargs))
        self._leaves, self._lift = leaves, lift
        if isinstance(z.shape[0], torch.SymInt):
            raise RuntimeError(
                "the batch size of z is a symbol, and a plan is made for a number: "
                "export it with a fixed batch size"
            )
        self._read()
        self._local: dict[tuple, list] = {}
        self._statics: dict[Any, tuple] = {}

    def _read(self) -> None:
        """Take in what a plan reads: the decoder's tensors, the further ones, and numbers."""
        history = _histories.get(id(self._home()))
        written = {} if history is None else history.written
        numbers = (
            self._all_numbers() if self._lift and history is not None and history.numbers else {}
        )
        self._numbers = {p: v for p, v in numbers.items() if history and p in history.numbers}
        if isinstance(self.decoder, nn.Module):
            self._print = _fingerprint_of(self.decoder, written, self._numbers)
        else:
            self._print = Fingerprint((), [], [])
        check_inputs(self.z, self._print.names, self._print.tensors)
        given = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        batch = self.z.shape[0]
        self.batched = [t.ndim > 0 and t.shape[0] == batch for t in given]
        lifted = [number_tensor(value) for value in self._numbers.values()]
        self.extras = [*given, *lifted]
        self.batched += [False] * len(lifted)
        self._key = self._whole_key()

    def _all_numbers(self) -> dict[Place, int | float]:
        """The numbers that a trace bakes in: the decoder's attributes and the further inputs."""
        return numbers_of(self.decoder, self._leaves)

    @property
    def tensors(self) -> list[Tensor]:
        """The decoder's parameters and buffers."""
        return self._print.tensors

    @property
    def names(self) -> list[str]:
        """Their dotted names."""
        return self._print.names

    def run(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Decode samples start to stop: (output [b, *out], tangents [m, b, *out])."""
        z, extras = self._slice(start, stop)
        plan = self.plan(z.shape[0])
        return plan.run(z, self._print.tensors, extras, self._prepared(plan))

    def run_checkpointed(self, finish: Callable[..., Any], start: int, stop: int) -> Any:
        """`finish(output, tangents, start, stop)`, recomputed in the backward, not stored."""
        # Before, not inside: a prelude may move buffers on and must run once.
        self._prepared(self.plan(stop - start))

        def compute() -> Any:
            return finish(*self.run(start, stop), start, stop)

        return checkpoint(compute, use_reentrant=False)

    def _prepared(self, plan: Any) -> tuple:
        if plan not in self._statics:
            self._statics[plan] = plan.prelude(self._print.tensors, self.extras)
        return self._statics[plan]

    def needs_grad(self, *others: Tensor | None) -> bool:
        """Whether a result would be part of an autograd graph.

        A callable that is not a module may hold tensors that are not visible: then it is assumed.
        """
        tensors = (self.z, *self._print.tensors, *self.extras, *others)
        hidden = not isinstance(self.decoder, nn.Module)
        required = hidden or any(t is not None and t.requires_grad for t in tensors)
        return required and torch.is_grad_enabled()

    def chunks(self, chunk_size: int | None = None) -> Iterator[tuple[int, int]]:
        """Bounds of near-equal chunks, of at most chunk_size samples or by a memory budget."""
        return chunk_bounds(self.z.shape[0], chunk_size or self.default_chunk())

    def plan(self, batch: int) -> Any:
        """The plan for chunks of that many samples, traced if there is none yet."""
        if batch == 1 < self.z.shape[0]:
            # One sample shows nothing of what samples take from each other.
            self.plan(2)
        home = self._home()
        plans = self._local if home is None else _plans.get(id(home), {})
        for plan in plans.get(self._key, ()):
            if plan.accepts(batch) and plan.asked.hold(self._fixed()):
                return plan
        history = None if home is None else _history_of(home)
        if history is not None and self._lift and history.lift(self._all_numbers()):
            # They are inputs from now on.
            self._read()
            return self.plan(batch)
        try:
            plan, effects = self._trace(batch)
        except NumberAsked:
            assert history is not None
            history.bake_in(self._numbers)
            self._read()
            return self.plan(batch)
        # The first one brings in the rules, and each tells what belongs into the key.
        self._key = self._whole_key()
        if history is not None:
            plans = _plans.setdefault(id(home), {})
            self._note(self.decoder, history, effects)
        # Those for other values than the decoder's are of no more use.
        kept = [p for p in plans.get(self._key, ()) if p.asked.hold(self._fixed())]
        plans[self._key] = [*kept, plan]
        while len(plans) > _MAX_PLANS:
            plans.pop(next(iter(plans)))
        return plan

    def _home(self) -> Any:
        """The module that the plans belong to, if any: what is derived of it lives for one call."""
        home = self.decoder
        while isinstance(home, Derived):
            home = home.inner
        return home if isinstance(home, nn.Module) else None

    def _note(self, decoder: Any, history: History, effects: Any) -> None:
        """Learn from a trace what belongs into the key, and say what makes traces frequent."""
        if history.learn(effects.written, effects.read):
            self._read()
        inputs = attributes(decoder, history.written)
        args, kwargs = pytree.tree_unflatten(self._leaves, self._spec)
        given = {f"further input {i + 1}": value for i, value in enumerate(args)}
        given.update((f"the further input {name}", value) for name, value in kwargs.items())
        inputs.update((n, (freeze(v), text_of(v))) for n, v in given.items() if not _has_tensor(v))
        history.note(inputs)

    def _trace(self, batch: int) -> Any:
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "the decoder's plan is not made inside torch.export: call it once before, with a "
                "batch of the same size"
            )
        # Late: the tracer brings in sympy, which `import fastsfvae` must not.
        from fastsfvae.jacobian.plan.build import build_plan
        from fastsfvae.jacobian.plan.samples import refuse_mixing
        from fastsfvae.jacobian.plan.trace import trace

        def rebuild(tensors: list[Tensor]) -> tuple[tuple, dict[str, Any]]:
            given = iter(tensors)
            filled = [next(given) if isinstance(x, Tensor) else x for x in self._leaves]
            put_numbers(self.decoder, filled, dict(zip(self._numbers, given, strict=True)))
            return pytree.tree_unflatten(filled, self._spec)

        z, extras = self._slice(0, batch)
        with _tracing:
            traced = trace(
                self.decoder,
                self._print.names,
                self._print.tensors,
                z,
                extras,
                self.batched,
                rebuild,
                len(self._numbers),
                advice := self._advice(),
            )
        trained = [t.requires_grad for t in self._print.tensors]
        plan = build_plan(traced, trained, self.batched, self.backend)
        refuse_mixing(traced, self._print.tensors, z, extras, self.batched, advice)
        plan.asked = Asked(traced.asked, self._fixed())
        return plan, traced.effects

    def _advice(self) -> str:
        """What a message of a failure adds where further inputs are taken to go with the batch."""
        args, kwargs = pytree.tree_unflatten(self._leaves, self._spec)
        batch, positions = self.z.shape[0], [*range(len(args))]
        if isinstance(self.decoder, Derived):
            positions = self.decoder.positions(len(args))

        def along(value: Any) -> bool:
            leaves = pytree.tree_leaves(value)
            return any(isinstance(t, Tensor) and t.shape[:1] == (batch,) for t in leaves)

        given = [*zip(positions, args, strict=True), *kwargs.items()]
        # What begins with _ is no input of the user's.
        places = tuple(p for p, value in given if not str(p).startswith("_") and along(value))
        if not places:
            return ""
        return (
            f" (by their first extent, {batch}, the further inputs {places} go with the samples: "
            f"give shared={places} for those that all samples share)"
        )

    def _fixed(self) -> list[Tensor]:
        """What no sample changes: parameters, buffers, further inputs without a batch axis."""
        pairs = zip(self.extras, self.batched, strict=True)
        return [*self._print.tensors, *[t for t, along in pairs if not along]]

    def _slice(self, start: int, stop: int | None) -> tuple[Tensor, list[Tensor]]:
        if start == 0 and (stop is None or stop == self.z.shape[0]):
            return self.z, self.extras
        extras = [
            t[start:stop] if along else t
            for t, along in zip(self.extras, self.batched, strict=True)
        ]
        return self.z[start:stop], extras

    def _whole_key(self) -> tuple:
        z = self.z
        leaves = tuple(
            (leaf.shape[1:] if self.batched[i] else leaf.shape, leaf.dtype, leaf.device)
            for i, leaf in enumerate(self.extras)
        )
        plain = tuple(
            None if (None, index) in self._numbers else freeze(leaf)
            for index, leaf in enumerate(self._leaves)
            if not isinstance(leaf, Tensor)
        )
        device = z.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        layers = dispatch.state() if self.backend == "triton" else None
        return (
            self._print.key,
            (z.shape[1], z.dtype, z.device, self.backend, layers, autocast, RULES.version),
            (self._spec, leaves, tuple(self.batched), plain),
        )

    def default_chunk(self) -> int:
        """Samples a chunk by a memory budget."""
        plan = self.plan(self.z.shape[0])
        budget = _CPU_BUDGET
        if self.z.is_cuda:
            properties = torch.cuda.get_device_properties(self.z.device)
            budget = properties.total_memory // _CUDA_SHARE
        # Without gradients only a layer's input and output are alive together.
        elements = plan.total if self.needs_grad() else 2 * plan.widest
        sample = max(1, elements * self.z.shape[1] * self.z.element_size())
        return max(1, budget // sample)
