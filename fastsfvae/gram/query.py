"""What is asked of a decoder's Gram: answered by the operator, or else by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from fastsfvae.gram.autograd import outputs_of, plain_outputs, total_of, transforms, weigh
from fastsfvae.gram.heads import HEADS
from fastsfvae.gram.operator import Prepared, Problem, call, output_shapes
from fastsfvae.jacobian.run.cache import Linearizer, chunk_bounds
from fastsfvae.jacobian.run.chunks import map_chunks
from fastsfvae.jacobian.run.known import remember
from fastsfvae.jacobian.run.sweep import Gathered, default_chunk, program_of
from fastsfvae.jacobian.validate import Shared, check_chunk_size, check_shape
from fastsfvae.ops._library import differentiate


class Query(NamedTuple):
    """What is asked of a decoder.

    Attributes:
        head: a key of `HEADS`.
        decoder: called as decoder(z, *args, **kwargs).
        z: latents ``[B, m]``.
        x: data ``[B, *out]``; None for the output itself, so that r = 0.
        inputs: the head's.
        args: further decoder inputs.
        kwargs: likewise, by name.
        backend: "torch", "triton" or "reference" (resolved: not "auto").
        chunk_size: samples whose tangents exist at one time; None chooses.
        tangents: directions ``[k, B, m]`` in place of the unit vectors.
        shared: which further inputs have no batch axis, whatever their first extent.
    """

    head: str
    decoder: Callable[..., Tensor]
    z: Tensor
    x: Tensor | None
    inputs: tuple[Tensor, ...]
    args: tuple
    kwargs: dict[str, Any]
    backend: str
    chunk_size: int | None
    tangents: Tensor | None = None
    shared: Shared = ()

    def asked(self) -> Query:
        """The same, of what has the unit vectors for its directions, and shares nothing."""
        # Late: both are seldom needed.
        query = self
        if query.shared != ():
            from fastsfvae.jacobian.shared import bind

            given = bind(query.decoder, query.args, query.kwargs, query.shared)
            query = query._replace(**given._asdict(), shared=())
        if query.tangents is not None:
            from fastsfvae.jacobian.directed import along

            asked = along(query.decoder, query.z, query.tangents, query.kwargs)
            query = query._replace(**asked._asdict(), tangents=None)
        return query


def weighted_total(query: Query, weights: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """The sum of weights * a head's first output, 0-d, and all its outputs.

    The sum alone is sure to be differentiable: its gradients are finished while it is evaluated,
    where the decoder's operations allow it and the weights need none themselves.

    Args:
        query: what is evaluated.
        weights: ``[B]``.
    """
    prepared = prepare(query)
    if prepared is not None and not weights.requires_grad:
        return total_of(prepared, weights)
    outputs = recomputed(query) if prepared is None else outputs_of(prepared)
    return weigh(outputs, weights), outputs


def head_outputs(query: Query) -> Sequence[Tensor]:
    """A head's outputs, each differentiable."""
    prepared = prepare(query)
    if prepared is None:
        return recomputed(query)
    # Who gives a chunk_size wants no more memory than that takes.
    return outputs_of(prepared, several=query.chunk_size is None)


def gradient_of_sum(query: Query, wanted: Tensor) -> Tensor:
    """The gradient, in one tensor alone, of the sum of a head's first output; without a graph.

    Args:
        query: what is evaluated.
        wanted: one of the further decoder inputs, with a batch axis and without a graph.
    """
    with torch.no_grad():
        prepared = prepare(query)
        if prepared is not None:
            problem, tensors = prepared
            shape, dtype = output_shapes(problem, tensors)[0]
            needs = [t is wanted for t in tensors]
            _, (gradient,) = call(problem, needs, [wanted.new_ones(shape, dtype=dtype)], tensors)
            return gradient
    with torch.enable_grad():
        wanted.requires_grad_()
        output = recomputed(query)[0]
        return differentiate([output], [torch.ones_like(output)], [wanted], create_graph=False)[0]


def prepare(query: Query) -> Prepared | None:
    """Trace the decoder and gather what the operator reads; None where autograd has to do it.

    Raises:
        ValueError: x does not match the decoder's output, or chunk_size is no int >= 1.
    """
    check_chunk_size(query.chunk_size)
    # An exported graph outlives this process, and a program's number does not.
    if query.backend == "reference" or _is_exporting():
        return None
    if torch.compiler.is_compiling():
        from fastsfvae.gram import compiled

        z, found = compiled.gather(
            *(query.decoder, query.z, query.args, query.kwargs, query.backend),
            *(query.tangents, query.shared),
        )
    else:
        asked = query.asked()
        remember(query.decoder)
        gathered = None if _is_transformed() else _gather(asked)
        if gathered is None:
            return None
        z, found = asked.z, gathered
    x = query.x
    check_shape(x, (z.shape[0], *found.shape))
    kind = z.device.type
    problem = Problem(
        data=x is not None,
        along=len(found.along),
        program=found.number,
        chunk_size=query.chunk_size or found.chunk_size,
        head=query.head,
        backend=query.backend,
        autocast=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        shape=found.shape,
        dtype=found.dtype,
    )
    data = () if x is None else (x,)
    return Prepared(problem, (z, *data, *query.inputs, *found.along, *found.whole))


def _gather(query: Query) -> Gathered | None:
    linearizer = Linearizer(query.decoder, query.z, query.args, query.kwargs, query.backend)
    size = query.chunk_size or default_chunk(linearizer)
    bounds = chunk_bounds(query.z.shape[0], size)
    program = program_of(linearizer, sorted({stop - start for start, stop in bounds}))
    if program is None:
        return None
    plan = program.plans[0]
    tensors = program.gather(linearizer.z, linearizer.tensors, linearizer.extras)
    return Gathered(program.number, size, plan.output_shape, plan.output_dtype, *tensors)


def _is_exporting() -> bool:
    # A compiler of torch 2.11 takes is_exporting() for always true.
    return torch.compiler._is_exporting_flag


def _is_transformed() -> bool:
    """Whether torch.func does with what is computed more than to differentiate it once."""
    return transforms() not in ([], [TransformType.Grad]) or forward_ad._current_level >= 0


def recomputed(query: Query) -> tuple[Tensor, ...]:
    """The outputs by autograd, for what has no adjoints; several chunks are computed twice."""
    query, of_batch = query.asked(), HEADS[query.head].along
    # An exporter follows no branch on a value, which the other formulas have.
    formulas = query._replace(backend="reference") if _is_exporting() else query

    def finish(output: Tensor, tangents: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        check_shape(query.x, (query.z.shape[0], *output.shape[1:]))
        x = () if query.x is None else (query.x[start:stop],)
        pairs = zip(query.inputs, of_batch, strict=True)
        inputs = [t[start:stop] if each else t for t, each in pairs]
        return plain_outputs(formulas, output, tangents, x, inputs)

    return map_chunks(
        *(finish, query.decoder, query.z, query.args, query.kwargs),
        backend=query.backend,
        chunk_size=query.chunk_size,
        also=(query.x, *query.inputs),
    )
