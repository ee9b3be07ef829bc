"""The operator under autograd, in two ways.

`total_of` knows the cotangents in its forward (they are the samples' weights), finishes the
gradients there and scales them in its backward. `outputs_of` learns them in its backward and sweeps
the batch again there; the tangents of a small batch are kept instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastsfvae.gram.heads import HEADS
from fastsfvae.gram.operator import Loop, Part, Prepared, Problem, call, output_shapes
from fastsfvae.jacobian.rules.jet import full_tangent, latent_jet
from fastsfvae.jacobian.run.cache import chunk_bounds
from fastsfvae.jacobian.run.chunks import flatten_in_memory_order
from fastsfvae.jacobian.run.sweep import find_program
from fastsfvae.ops._library import differentiate, refuse_vmap


def total_of(prepared: Prepared, weights: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """The sum of weights * a head's first output, 0-d, and its outputs, which have no gradient.

    Args:
        prepared: what is evaluated.
        weights: ``[B]``, without a gradient of their own.
    """
    problem, tensors = prepared
    needs = _needs(tensors)
    if not any(needs):
        outputs, _ = call(problem, needs, (), tensors)
        return weigh(outputs, weights), outputs
    count = len(output_shapes(problem, tensors))
    total, *outputs = _Total.apply(problem, needs, weights, *tensors)
    return total, outputs[:count]


def outputs_of(prepared: Prepared, several: bool = False) -> Sequence[Tensor]:
    """A head's outputs, each differentiable.

    Args:
        prepared: what is evaluated.
        several: whether the tangents of several chunks may be kept for the backward.
    """
    problem, tensors = prepared
    needs = _needs(tensors)
    if not any(needs):
        return call(problem, needs, (), tensors)[0]
    kept = Kept(several, []) if _may_keep() else None
    return _Outputs.apply(problem, needs, kept, *tensors)


def weigh(outputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The sum of weights * the first output."""
    # Not a dot product, which autocast would round to half precision; on a GPU it is two launches
    # as well.
    return (outputs[0] * weights).sum()


def transforms() -> list[TransformType]:
    """Those of torch.func that run, the outermost first."""
    return [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]


class Kept(NamedTuple):
    """Tangents that wait for the backward.

    Attributes:
        several: whether those of several chunks may.
        loops: the loop with its parts, once the forward has run; until the backward takes it.
    """

    several: bool
    loops: list[tuple[Loop, list[Part]]]


def _may_keep() -> bool:
    """Whether a chunk's tangents may wait for the backward, outside of the operator.

    Not where somebody listens who knows the operator and not what is in it, nor where what is saved
    is handed to somebody else, such as a checkpoint.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def _is_mapped(cotangents: Sequence[Tensor]) -> bool:
    """Whether a vmap runs a backward for several cotangents at once."""
    legacy = map(torch._C._functorch.is_legacy_batchedtensor, cotangents)
    return any(legacy) or TransformType.Vmap in transforms()


def _asked(ctx: Any, needs: Sequence[bool]) -> tuple[bool, ...]:
    """Of the gradients that could be needed those that a backward was called for."""
    wanted = ctx.needs_input_grad[3:]
    if not transforms():
        pairs = zip(wanted, ctx.next_functions, strict=True)
        wanted = [could and _will_run(node) for could, (node, _) in pairs]
    return tuple(need and could for need, could in zip(needs, wanted, strict=True))


def _will_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # A leaf that torch.autograd.grad was asked for.
        return True


def _pull(problem: Problem, needs: Sequence[bool], kept: list, cotangents: Any, tensors: tuple):
    """The gradients, of what was kept or all over again."""
    if not kept:
        return call(problem, needs, [t.contiguous() for t in cotangents], tensors)[1]
    loop, parts = kept.pop()
    with torch.no_grad():
        loop.narrow(needs)
        # Each part's tangents are freed when it has been pulled.
        while parts:
            loop.pull(parts.pop(0), cotangents)
        return loop.gradients()


def _refuse_second_order(problem: Problem) -> None:
    if problem.backend != "torch":
        raise RuntimeError(
            f'backend="{problem.backend}" has first derivatives only; second order needs '
            'backend="torch" (or "reference")'
        )


def _needs(tensors: tuple) -> tuple[bool, ...]:
    enabled = torch.is_grad_enabled()
    return tuple(enabled and t.requires_grad for t in tensors)


def _spread(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    given = iter(grads)
    return [next(given) if need else None for need in needs]


class _Total(torch.autograd.Function):
    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(problem, needs, weights, *tensors):
        _, dtype = output_shapes(problem, tensors)[0]
        outputs, grads = call(problem, needs, [weights.to(dtype)], tensors)
        return weigh(outputs, weights), *outputs, *grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.needs, _, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        wanted = [t for t, need in zip(tensors, ctx.needs, strict=True) if need]
        ctx.save_for_backward(*output[-len(wanted) :], *wanted)

    @staticmethod
    def backward(ctx, upstream, *_):
        if upstream is None:
            return (None,) * (3 + len(ctx.needs))
        # Read once: a checkpoint unpacks them once.
        count, saved = sum(ctx.needs), ctx.saved_tensors
        grads, wanted = saved[:count], saved[count:]
        compiling = torch.compiler.is_compiling()
        if not compiling and _is_mapped([upstream]):
            grads = [g * upstream for g in grads]
        else:
            # One launch where they are of one dtype.
            grads = torch._foreach_mul(grads, upstream)
        if torch.is_grad_enabled() and not compiling:
            grads = _Last.apply(count, *grads, *wanted)
        return None, None, None, *_spread(grads, ctx.needs)


class _Last(torch.autograd.Function):
    """Gradients that know what they depend on, and refuse to be differentiated by it.

    torch.func.grad always runs a backward as with create_graph, so that it cannot refuse at once.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(count, *tensors):
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Nothing is kept."""

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "the loss's gradients are finished in its forward and have no derivative: for second "
            'order give reduction="none" and backend="torch"'
        )


class _Outputs(torch.autograd.Function):
    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(problem, needs, kept, *tensors):
        if kept is not None:
            loop = Loop(problem, tensors, needs, holds=True)
            if len(loop) == 1 or (kept.several and loop.is_small()):
                # As long as autograd keeps the graph.
                with torch.no_grad():
                    parts = list(loop)
                    kept.loops.append((loop, parts))
                    return tuple(loop.outputs([part.found.outputs for part in parts]))
        return tuple(call(problem, needs, (), tensors)[0])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.problem, ctx.needs, kept, *tensors = inputs
        ctx.kept = [] if kept is None else kept.loops
        if not torch.compiler.is_compiling():
            # The backward runs it again, perhaps after the decoder's plans were renewed.
            ctx.program = find_program(ctx.problem.program)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        # Read even where they were kept: autograd refuses what was changed in the meantime.
        problem, needs, tensors = ctx.problem, ctx.needs, ctx.saved_tensors
        if torch.compiler.is_compiling():
            return None, None, None, *_spread(_pull(problem, needs, [], cotangents, tensors), needs)
        needs, kept = _asked(ctx, needs), ctx.kept
        grads: Sequence[Tensor]
        if _is_mapped(cotangents):
            # There are rules for every operation of autograd's graph, and none for the operator.
            with torch.enable_grad():
                tensors = _aliases(tensors)
                grads = _plain_gradients(problem, needs, cotangents, tensors)
        elif torch.is_grad_enabled():
            if not transforms():
                # torch.func.grad always asks for a graph, and seldom needs it.
                _refuse_second_order(problem)
            grads = _Gradients.apply(problem, needs, kept, len(cotangents), *cotangents, *tensors)
        else:
            grads = _pull(problem, needs, kept, cotangents, tensors)
        return None, None, None, *_spread(grads, needs)


class _Gradients(torch.autograd.Function):
    """The gradients of `_Outputs`, differentiable by autograd: all chunks' tangents at once."""

    @staticmethod
    def forward(problem, needs, kept, count, *tensors):
        return tuple(_pull(problem, needs, kept, tensors[:count], tensors[count:]))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.problem, ctx.needs, _, ctx.count, *tensors = inputs
        ctx.program = find_program(ctx.problem.program)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *upstream):
        again, tensors = torch.is_grad_enabled(), ctx.saved_tensors
        _refuse_second_order(ctx.problem)
        needs = ctx.needs_input_grad[4:]
        with torch.enable_grad():
            tensors = _aliases(tensors)
            cotangents, given = tensors[: ctx.count], tensors[ctx.count :]
            grads = _plain_gradients(ctx.problem, ctx.needs, cotangents, given)
            wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
            seconds = differentiate(grads, upstream, wanted, create_graph=again)
        return None, None, None, None, *_spread(seconds, needs)


def _aliases(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors: where one depends on another, that path is not to be taken here."""
    return [t.view_as(t) for t in tensors]


def _plain_gradients(
    problem: Problem, needs: Sequence[bool], cotangents: Sequence[Tensor], tensors: Sequence[Tensor]
) -> Sequence[Tensor]:
    """The gradients of a problem's outputs by autograd, with a graph of their own."""
    program, enabled = find_program(problem.program), problem.autocast is not None

    def outputs(*wanted: Tensor) -> tuple[Tensor, ...]:
        given = iter(wanted)
        filled = [next(given) if need else t for need, t in zip(needs, tensors, strict=True)]
        z, x, inputs, along, whole = problem.split(filled)
        cut = HEADS[problem.head].along
        parts = []
        for start, stop in chunk_bounds(len(filled[0]), problem.chunk_size):
            rows = slice(start, stop)
            own = [t[rows] if each else t for t, each in zip(inputs, cut, strict=True)]
            with torch.autocast(z[0].device.type, problem.autocast, enabled=enabled):
                y = program.body(latent_jet(z[0][rows]), [t[rows] for t in along], whole)
                part = y.primal, full_tangent(y), [t[rows] for t in x], own
                parts.append(plain_outputs(problem, *part))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
    if transforms():
        # What autograd has saved may belong to a transform that has ended.
        return torch.func.vjp(outputs, *wanted)[1](tuple(cotangents))
    return differentiate(outputs(*wanted), cotangents, wanted, create_graph=True)


def plain_outputs(
    asked: Any, output: Tensor, tangents: Tensor, x: Sequence[Tensor], inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """A chunk's outputs by operations that autograd differentiates.

    Args:
        asked: tells head and backend.
        output: f(z), ``[b, *out]``.
        tangents: ``[m, b, *out]``.
        x: the data ``[b, *out]``; nothing for r = 0.
        inputs: the head's.
    """
    residual = x[0] - output if x else torch.zeros_like(output)
    flat = flatten_in_memory_order(tangents, residual)
    return HEADS[asked.head].plain(output, *flat, inputs, asked.backend)
