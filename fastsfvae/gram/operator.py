"""The operator `fastsfvae::gram`: from latents to what is made of a decoder's Gram.

It holds the whole chunk loop: a chunk's value and tangents, its (G, p, rr), what a head makes of
them (`fastsfvae.gram.heads`) and, for given cotangents of the head's outputs, the gradients of
everything, finished while the chunk's tangents exist. It has no derivative of its own:
`fastsfvae.gram.autograd` stands over it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastsfvae.gram.contracted import Contracted, ThroughLayer
from fastsfvae.gram.heads import HEADS, ChunkGram, Found, Shape
from fastsfvae.gram.tail import Unwritten
from fastsfvae.gram.written import Written
from fastsfvae.jacobian.plan.last_layer import LastLayer, Linear
from fastsfvae.jacobian.rules.jet import Jet
from fastsfvae.jacobian.run.sweep import Chunk, Sweep, find_program
from fastsfvae.ops._library import refuse_vmap

Item = TypeVar("Item")
# Bytes of tangents on a CPU that may wait for a backward, each operation's counted.
_HELD = 256 * 2**20


class Problem(NamedTuple):
    """The operator's arguments that are no tensors; the decoder by its program's number.

    `data` says whether there is an x, `along` counts the further decoder inputs with a batch axis;
    `shape` and `dtype` are those of one sample's output.
    """

    data: bool
    along: int
    program: int
    chunk_size: int
    head: str
    backend: str
    autocast: torch.dtype | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    def split(self, items: Sequence[Item]) -> tuple[Sequence[Item], ...]:
        """What belongs to z, x, the head's inputs, `along` and `whole`; nothing to x without it."""
        counts = 1, int(self.data), len(HEADS[self.head].along), self.along
        ends = (0, *itertools.accumulate(counts), len(items))
        return tuple(items[start:stop] for start, stop in itertools.pairwise(ends))


class Prepared(NamedTuple):
    """A problem and its tensors.

    Attributes:
        problem: constants.
        tensors: z ``[B, m]``; the data x ``[B, *out]`` if there is any; the head's inputs; `along`,
            the decoder's further inputs with a batch axis; `whole`, its parameters and inputs
            without one.
    """

    problem: Problem
    tensors: tuple[Tensor, ...]


def gram_of(
    result: Jet | LastLayer,
    x: Tensor | None,
    backend: str,
    pulled: bool = True,
    of_data: bool = True,
) -> ChunkGram:
    """The Gram of a chunk.

    Args:
        result: what its plan returned.
        x: data ``[b, *out]``; None for the decoder's own output, so that r = 0.
        backend: "torch" or "triton".
        pulled: whether a gradient will be wanted.
        of_data: whether x's will be; without, it may be missing.
    """
    if not isinstance(result, LastLayer):
        return Written(result, x, backend)
    if isinstance(result.tail, Linear):
        contracted = Contracted(result.source, result.tail, x)
        return contracted if contracted.contracts else ThroughLayer(result.source, result.tail, x)
    return Unwritten(result.tail, x, pulled, of_data)


class Part(NamedTuple):
    """A chunk between the two halves of a loop."""

    chunk: Chunk
    gram: ChunkGram
    inputs: list[Tensor]
    found: Found


class Loop:
    """One pass over a batch: iterate for the parts, `pull` each for gradients.

    Args:
        problem: what is evaluated.
        tensors: its tensors.
        needs: for each of them, whether its gradient is wanted.
        cotangents: what `pull` will be given, where it is known so early.
        holds: whether parts are pulled when all have run.
    """

    def __init__(
        self,
        problem: Problem,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        cotangents: Sequence[Tensor] = (),
        holds: bool = False,
    ):
        self._problem, self._head = problem, HEADS[problem.head]
        self._tensors, self._needs, self._cotangents = tensors, needs, cotangents
        z, x, inputs, along, whole = problem.split(tensors)
        of_z, _, _, of_along, of_whole = problem.split(needs)
        dtype = torch.promote_types(z[0].dtype, torch.float32)
        dtype = torch.promote_types(x[0].dtype, dtype) if x else dtype
        self._x, self._inputs, self._device = x, [t.to(dtype) for t in inputs], z[0].device.type
        program = find_program(problem.program)
        needed = of_z[0], of_along, of_whole
        # Parts of a divided chunk are pulled one by one.
        given = program, z[0], along, whole, needed, problem.chunk_size
        self._sweep = Sweep(*given, divides=bool(cotangents), holds=holds)
        # Of x and the head's inputs, one a chunk.
        self._grads: list[list[Tensor]] = [[] for _ in (*x, *inputs)]

    def narrow(self, needs: Sequence[bool]) -> None:
        """Want no more gradients than `needs` says, before anything is pulled."""
        self._needs = needs
        of_z, _, _, of_along, of_whole = self._problem.split(needs)
        self._sweep.narrow((of_z[0], of_along, of_whole))

    def __len__(self) -> int:
        """The number of parts."""
        return -(-len(self._tensors[0]) // self._problem.chunk_size)

    def is_small(self) -> bool:
        """Whether the tangents of all parts may be held at once, on a CPU.

        On a GPU a part is what its memory holds.
        """
        z, program = self._tensors[0], find_program(self._problem.program)
        sample = program.plans[0].total * z.shape[1] * z.element_size()
        return self._problem.backend == "torch" and z.is_cpu and len(z) * sample <= _HELD

    def __iter__(self) -> Iterator[Part]:
        """Run the forward half of each chunk in turn."""
        chunks, autocast = iter(self._sweep), self._problem.autocast
        while True:
            # Autocast shapes the decoder's values and tangents; adjoints follow their dtypes. Its
            # cache would keep casts made without a graph, and the caller's own use of the decoder
            # in the same region would take them and leave its weights without gradients.
            enabled = autocast is not None
            with torch.autocast(self._device, autocast, enabled=enabled, cache_enabled=False):
                chunk = next(chunks, None)
            if chunk is None:
                return
            rows = slice(chunk.start, chunk.stop)
            with torch.autocast(self._device, enabled=False):
                x = self._x[0][rows] if self._x else None
                wanted = any(self._needs), bool(self._x) and self._needs[1]
                gram_of_chunk = gram_of(chunk.output, x, self._problem.backend, *wanted)
                pairs = zip(self._inputs, self._head.along, strict=True)
                inputs = [t[rows] if along else t for t, along in pairs]
                known = [t[rows] for t in self._cotangents] or None
                found = self._head.find(gram_of_chunk, inputs, known)
            yield Part(chunk, gram_of_chunk, inputs, found)

    def outputs(self, found: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        """The head's outputs for the whole batch, in memory of their own."""
        columns, shapes = zip(*found, strict=True), output_shapes(self._problem, self._tensors)
        lone = self._head.fresh and len(found) == 1
        return [
            (column[0] if lone else torch.cat(column)).to(dtype).reshape(shape).contiguous()
            for column, (shape, dtype) in zip(columns, shapes, strict=True)
        ]

    def pull(self, part: Part, cotangents: Sequence[Tensor]) -> None:
        """Run the backward half of a chunk, for cotangents of the whole batch's outputs.

        Those of the last outputs may be missing, and are then 0.
        """
        rows = slice(part.chunk.start, part.chunk.stop)
        with torch.autocast(self._device, enabled=False):
            own = [t[rows] for t in cotangents]
            _, _, needs, *_ = self._problem.split(self._needs)
            pulled = self._head.pull(part.gram, part.found, part.inputs, own, needs)
            given = (pulled.gram.x, *pulled.inputs) if self._x else pulled.inputs
            needs = self._needs[1 : 1 + len(given)]
            for need, grads, gradient in zip(needs, self._grads, given, strict=True):
                if need:
                    assert gradient is not None
                    grads.append(gradient)
            part.chunk.pull(pulled.gram.jet, pulled.gram.others)

    def gradients(self) -> list[Tensor]:
        """Those that are wanted, in order, when every part has been pulled.

        Each in the dtype and with the strides that `torch.empty_like` gives its tensor.
        """
        along = (True,) * len(self._x) + self._head.along
        own = [
            torch.cat(grads) if whole and len(grads) > 1 else sum(grads[1:], grads[0])
            for whole, grads in zip(along, self._grads, strict=True)
            if grads
        ]
        swept, of_z = self._sweep.gradients(), int(self._needs[0])
        wanted = [t for t, need in zip(self._tensors, self._needs, strict=True) if need]
        found = [*swept[:of_z], *own, *swept[of_z:]]
        return [_laid_out(g, t) for g, t in zip(found, wanted, strict=True)]


def _laid_out(gradient: Tensor, tensor: Tensor) -> Tensor:
    same = gradient.dtype == tensor.dtype and gradient.stride() == tensor.stride()
    if same and tensor.is_contiguous():
        return gradient
    like = torch.empty_like(tensor)
    same = gradient.dtype == like.dtype and gradient.stride() == like.stride()
    return gradient if same else like.copy_(gradient)


def output_shapes(problem: Problem, tensors: Sequence[Tensor]) -> list[Shape]:
    """Extents and dtype of each output of a problem's head."""
    z, x, *_ = problem.split(tensors)
    dtype = torch.promote_types(problem.dtype, (x or z)[0].dtype)
    sums = torch.promote_types(torch.promote_types(dtype, z[0].dtype), torch.float32)
    batch, m = z[0].shape
    return HEADS[problem.head].shapes(batch, m, problem.shape, problem.dtype, sums)


@torch.library.custom_op("fastsfvae::gram", mutates_args=())
def gram(
    tensors: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    needs: Sequence[bool],
    data: bool,
    along: int,
    program: int,
    chunk_size: int,
    head: str,
    backend: str,
    autocast: torch.dtype | None,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    """A head's outputs, then the gradients that `needs` asks for.

    Args:
        tensors: as in `Prepared`.
        cotangents: of the outputs, of the first ones perhaps alone; none gives the outputs alone.
        needs: for each tensor, whether its gradient is wanted.
        data: as in `Problem`, like all that follow.
        along: how many further inputs have a batch axis.
        program: the number of the decoder's program.
        chunk_size: samples whose tangents exist at one time.
        head: a key of `HEADS`.
        backend: "torch" or "triton".
        autocast: the dtype of an autocast region around the call, or None.
        shape: of one sample's output.
        dtype: of the decoder's output.
    """
    parts = data, along, program, chunk_size, head, backend, autocast, tuple(shape), dtype
    if not cotangents:
        needs = [False] * len(needs)
    loop, outputs = Loop(Problem(*parts), tensors, needs, cotangents), []
    with torch.no_grad():
        for part in loop:
            outputs.append(part.found.outputs)
            if cotangents:
                loop.pull(part, cotangents)
        return [*loop.outputs(outputs), *(loop.gradients() if cotangents else [])]


@gram.register_fake
def _(tensors, cotangents, needs, *parts):
    outputs = [
        tensors[0].new_empty(shape, dtype=dtype)
        for shape, dtype in output_shapes(Problem(*parts), tensors)
    ]
    pairs = zip(tensors, needs, strict=True)
    return [*outputs, *(torch.empty_like(t) for t, need in pairs if cotangents and need)]


gram.register_vmap(refuse_vmap)


def call(
    problem: Problem, needs: Sequence[bool], cotangents: Sequence[Tensor], tensors: tuple
) -> tuple[list[Tensor], list[Tensor]]:
    """The operator's outputs and gradients."""
    results = gram(list(tensors), list(cotangents), list(needs), *problem)
    count = len(results) - (sum(needs) if cotangents else 0)
    return results[:count], results[count:]
