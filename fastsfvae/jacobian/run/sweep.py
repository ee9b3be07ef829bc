"""Programs: a traced decoder as a function of tensors alone, which an operator can run by number.

A sweep carries a chunk of samples and its tangents forward, asks for the gradient of (output, J)
and pulls it back by the rules' adjoints before the next chunk begins. So one chunk's tangents exist
at a time, and gradients are finished in the forward pass.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastsfvae.jacobian.plan.last_layer import LastLayer
from fastsfvae.jacobian.rules.jet import Jet, from_stack, latent_jet, stack_of
from fastsfvae.jacobian.rules.tape import Recorded, Tape
from fastsfvae.jacobian.run.cache import Linearizer, chunk_bounds
from fastsfvae.kernels._contract import asked_for
from fastsfvae.ops._gpu import cache_bytes, gpu_of

if TYPE_CHECKING:
    from fastsfvae.jacobian.plan.plan import Halves, Plan

# Bytes of a chunk's tangents on a CPU, each operation's counted: fewer and its calls cost more than
# they do, more and their memory is not reused (see `_reuse_memory`).
_CPU_BUDGET = 64 * 2**20

# Turns it on or off; bytes of a GPU's L2 from which on few samples' last stacks fit there, and the
# share of it that they may take: a stack, its gradient and J are alive together.
DIVIDE, _LARGE_CACHE, _CACHE_SHARE, _ALIVE = "FASTSFVAE_DIVIDE", 72 * 10**6, 0.75, 2.5
# Compute capabilities where that is computed to pay.
_PAYS = (89,)

# Tensors and their gradients.
Pairs = Sequence[tuple[Tensor, Tensor]]

_numbers = itertools.count()
_programs: weakref.WeakValueDictionary[int, Program] = weakref.WeakValueDictionary()


class Program:
    """Plans of one decoder for different chunk sizes, and where their inputs come from.

    Args:
        plans: at least one; they agree on what they read.
        count: of the decoder's parameters and buffers.
        batched: for each further tensor input, whether it has the batch axis.
    """

    def __init__(self, plans: Sequence[Plan], count: int, batched: Sequence[bool]):
        self.plans, self._count, self._batched = tuple(plans), count, tuple(batched)
        self.number = next(_numbers)
        _programs[self.number] = self

    def plan(self, size: int) -> Plan:
        """The plan for chunks of that many samples.

        Raises:
            RuntimeError: a compiled program meets a size, or a value, that it was not made for.
        """
        for plan in self.plans:
            if plan.accepts(size):
                plan.asked.check()
                return plan
        raise RuntimeError(
            f"a chunk of {size} samples is none that this decoder was traced for: give a smaller "
            "chunk_size, or compile again"
        )

    def gather(
        self, z: Tensor, tensors: Sequence[Tensor], extras: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(along, whole): the body's tensor inputs with and without a batch axis.

        Runs the plan's prelude and side computations, under autograd where it is on.
        """
        plan = self.plans[0]
        statics = plan.prelude(tensors, extras)
        sides = plan.side(z, tensors, extras, statics)
        pairs = list(zip(extras, self._batched, strict=True))
        along = [t for t, batched in pairs if batched] + list(sides)
        used = [tensors[index] for index in plan.body_inputs]
        return along, [*used, *[t for t, batched in pairs if not batched], *statics]

    def body(
        self, z: Jet, along: Sequence[Tensor], whole: Sequence[Tensor], to_tail: int = 0
    ) -> Any:
        """Run the body of a chunk on what `gather` returned, `along` cut to its samples.

        It gives a Jet; or, where the plan has a tail for calls of `to_tail` samples, a `LastLayer`.
        """
        plan = self.plan(z.primal.shape[0])
        run = plan.body if plan.to_tail is None or to_tail < plan.tail_from else plan.to_tail
        return run(z, *self.inputs(along, whole))

    def prepare_weights(self, whole: Sequence[Tensor]) -> None:
        """Cast or round the fused layers' weights at once, for the tape that records."""
        plan = self.plans[0]
        if plan.fused_weights:
            # Late: a decoder without fused layers needs none of it.
            from fastsfvae.jacobian.rules.fused_layer import prepare_weights

            used = dict(zip(plan.body_inputs, whole, strict=False))
            prepare_weights([(used[index], layer) for index, layer in plan.fused_weights])

    def inputs(
        self, along: Sequence[Tensor], whole: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], list[Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A plan's (tensors, extras, statics, sides) from what `gather` returned."""
        body_inputs = self.plans[0].body_inputs
        used, fixed = len(body_inputs), self._batched.count(False)
        tensors: list[Tensor | None] = [None] * self._count
        for index, tensor in zip(body_inputs, whole, strict=False):
            tensors[index] = tensor
        of_batch, of_call = iter(along), iter(whole[used : used + fixed])
        extras = [next(of_batch) if batched else next(of_call) for batched in self._batched]
        return tensors, extras, tuple(whole[used + fixed :]), tuple(of_batch)


class Gathered(NamedTuple):
    """A program by its number, its default chunk, and what an operator reads of its decoder.

    Attributes:
        number: of the program, which the caller keeps alive.
        chunk_size: by default.
        shape: of one sample's output.
        dtype: of the output.
        along: tensors with a batch axis.
        whole: tensors without.
    """

    number: int
    chunk_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    along: list[Tensor]
    whole: list[Tensor]


def find_program(number: int) -> Program:
    """The program of that number, which its caller keeps alive."""
    return _programs[number]


@functools.cache
def _reuse_memory() -> None:
    """Let a chunk's tensors take the memory that the one before has freed.

    glibc gives large blocks back to the system, and faulting their pages in again is up to a fifth
    of a step. To free one block of nearly 32 MiB moves that bound to its largest, for the process.
    """
    torch.empty(2**25 - 2**13, dtype=torch.uint8)


def divides_on(device: torch.device) -> bool:
    """Whether a chunk's last layers run by few samples: more launches, which only a graph hides.

    Where nobody asks, as `python -m bench.model --kernels` computes it: an RTX 4090 gains by it, an
    RTX 5090, whose memory is nearer to its L2, loses.

    Raises:
        ValueError: an unknown $FASTSFVAE_DIVIDE.
    """
    asked = asked_for(DIVIDE)
    if asked is False or cache_bytes(device) < _LARGE_CACHE:
        return False
    if asked is None:
        gpu = gpu_of(device)
        if gpu is None or gpu.capability not in _PAYS:
            return False
    return torch.cuda.is_current_stream_capturing()


def samples_in_cache(stack: Tensor, elements: int) -> int:
    """Samples whose stacks behind a cut the device's L2 holds: a power of two.

    Args:
        stack: in front of it, ``[1 + m, B, ...]``.
        elements: of a sample's largest value behind it.
    """
    sample = _ALIVE * len(stack) * elements * stack.element_size()
    fit = max(1, int(_CACHE_SHARE * cache_bytes(stack.device) / sample))
    return 1 << (fit.bit_length() - 1)


def default_chunk(linearizer: Linearizer) -> int:
    """Samples a chunk: on a CPU what its caches hold, on a GPU what fits its memory."""
    z = linearizer.z
    if z.is_cuda:
        return linearizer.default_chunk()
    plan = linearizer.plan(z.shape[0])
    return max(1, _CPU_BUDGET // max(1, plan.total * z.shape[1] * z.element_size()))


def program_of(linearizer: Linearizer, sizes: Sequence[int]) -> Program | None:
    """The program that a batch's chunks need, None where a part of the decoder has no adjoint."""
    plans = list(dict.fromkeys(linearizer.plan(size) for size in sizes))
    first = plans[0]
    for plan in plans:
        same = plan.signature == first.signature
        if plan.obstacles or not same:
            return None
    if first.signature[2] and not first.accepts(linearizer.z.shape[0]):
        return None
    key = tuple(id(plan) for plan in plans)
    if key not in first.programs:
        first.programs[key] = Program(plans, len(linearizer.tensors), linearizer.batched)
    return first.programs[key]


class Chunk(NamedTuple):
    """One chunk of a sweep, between its two halves.

    Attributes:
        start: its first sample.
        stop: behind its last one.
        output: of the decoder; or where it stopped, if its plan has a tail.
        pull: takes the gradient of `output`, or of the last layer's source; and, as pairs, tensors
            of the last layer with their gradients.
    """

    start: int
    stop: int
    output: Jet | LastLayer
    pull: Callable[[Jet, Pairs], None]


class Sweep:
    """The chunk loop of one batch; iterate over it, and call each chunk's `pull` for gradients.

    Args:
        program: the decoder.
        z: ``[B, m]``.
        along: tensors with the batch axis.
        whole: tensors without.
        needs: which gradients are wanted: z's, those of `along`, those of `whole`.
        chunk_size: at most that many samples a chunk.
        divides: whether a chunk whose last layers' stacks a cache could hold, of fewer samples, is
            run so behind the cut (`Halves`).
        holds: whether chunks may be pulled when all have run; without, each must be before the next
            one begins. Not of what is divided.
    """

    def __init__(
        self,
        program: Program,
        z: Tensor,
        along: Sequence[Tensor],
        whole: Sequence[Tensor],
        needs: tuple[bool, Sequence[bool], Sequence[bool]],
        chunk_size: int,
        divides: bool = False,
        holds: bool = False,
    ):
        self._program, self._whole, self._holds = program, whole, holds
        self._divides = divides and divides_on(z.device)
        self._batch, self._size = (z, *along), chunk_size
        self._want(needs)
        if z.device.type == "cpu":
            _reuse_memory()
        # The second one records what is behind a cut.
        self._tape = Tape(self._wanted)
        self._inner = Tape(self._wanted, beside=self._tape)
        self._parts: list[list[Tensor]] = [[] for _ in self._batch]

    def _want(self, needs: tuple[bool, Sequence[bool], Sequence[bool]]) -> None:
        self._needs = needs[0], *needs[1]
        self._wanted = [t for t, need in zip(self._whole, needs[2], strict=True) if need]

    def narrow(self, needs: tuple[bool, Sequence[bool], Sequence[bool]]) -> None:
        """Want no more gradients than `needs` says, before anything is pulled."""
        self._want(needs)
        others = [t for t, need in zip(self._whole, needs[2], strict=True) if not need]
        self._tape.leave(others)
        self._inner.leave(others)

    def __iter__(self) -> Iterator[Chunk]:
        """Run the forward half of each chunk in turn."""
        for start, stop in chunk_bounds(self._batch[0].shape[0], self._size):
            z, *along = (t[start:stop] for t in self._batch)
            jet = latent_jet(z)
            sources: tuple[Any, ...] = (jet, *along)
            with self._tape:
                for source, need in zip(sources, self._needs, strict=True):
                    if need:
                        self._tape.activate(source)
                self._program.prepare_weights(self._whole)
                halves = self._program.plan(len(z)).halves if self._divides else None
                if halves is not None:
                    given = self._program.inputs(along, self._whole)
                    middle = halves.to_cut(jet, *given)
                else:
                    whole_batch = self._batch[0].shape[0]
                    output = self._program.body(jet, along, self._whole, to_tail=whole_batch)
            if halves is not None:
                yield from self._divided(halves, middle, given, start, sources)
                continue
            last = output.source if isinstance(output, LastLayer) else output
            held = self._tape.put_aside() if self._holds else None

            def pull(grad: Jet, others: Pairs, last: Jet = last, sources: tuple = sources,
                     held: Recorded | None = held) -> None:  # fmt: skip
                if held is not None:
                    self._tape.take_up(held)
                for tensor, gradient in others:
                    self._tape.add(tensor, gradient)
                self._pull(last, grad, sources)

            yield Chunk(start, stop, output, pull)

    def _divided(
        self, halves: Halves, middle: Jet, given: tuple, start: int, sources: tuple
    ) -> Iterator[Chunk]:
        """A chunk whose first half has run, behind the cut a few samples at a time."""
        stack, samples = stack_of(middle), middle.primal.shape[0]
        size = samples_in_cache(stack, halves.elements)
        # In the order of the kernels, which store there.
        grads = torch.empty_like(
            stack.movedim(2, -1), memory_format=torch.contiguous_format
        ).movedim(-1, 2)
        for first, end in chunk_bounds(samples, size):
            rows = slice(first, end)
            part = from_stack(stack[:, rows])
            with self._inner:
                self._inner.activate(part, into=grads[:, rows])
                output = halves.from_cut(part, *given)

            def pull(grad: Jet, others: Pairs, output: Any = output, part: Jet = part,
                     rows: slice = rows) -> None:  # fmt: skip
                for tensor, gradient in others:
                    self._inner.add(tensor, gradient)
                with self._inner:
                    self._inner.pull(output.source, grad)
                found, own = stack_of(self._inner.take(part)), grads[:, rows]
                if found.data_ptr() != own.data_ptr():
                    own.copy_(found)
                if rows.stop == samples:
                    self._pull(middle, from_stack(grads), sources)

            yield Chunk(start + first, start + end, output, pull)

    def _pull(self, last: Jet, grad: Jet, sources: tuple) -> None:
        """Pull back to a chunk's sources, and take their gradients."""
        with self._tape:
            self._tape.pull(last, grad)
        for source, need, parts in zip(sources, self._needs, self._parts, strict=True):
            if need:
                parts.append(_gradient(self._tape.take(source), source))

    def gradients(self) -> list[Tensor]:
        """Those of all wanted tensors, in order, when every chunk has been pulled."""
        along = [
            parts[0] if len(parts) == 1 else torch.cat(parts)
            for parts, need in zip(self._parts, self._needs, strict=True)
            if need
        ]
        self._tape.finish()
        self._inner.finish()
        for tensor in self._wanted:
            behind_cut = self._inner.take(tensor)
            if behind_cut is not None:
                self._tape.add(tensor, behind_cut)
        return along + [_gradient(self._tape.take(t), t) for t in self._wanted]


def _gradient(found: Jet | Tensor | None, source: Jet | Tensor) -> Tensor:
    # The tangents of z are constants.
    if isinstance(source, Jet):
        source, found = source.primal, None if found is None else found.primal  # type: ignore[union-attr]
    return torch.zeros_like(source) if found is None else found  # type: ignore[return-value]
