"""A plan: a traced decoder as straight-line Python that carries tangents.

The prelude computes what depends on parameters and unbatched inputs only (the effective weights of
weight_norm, an attention mask): once per call, outside the chunk loop. `side` computes what depends
on parameters and batched inputs but not on z (the embedding of a label). The body runs per chunk:
operations on Jets through their rules, everything else as it is.

A plan is sweepable where the gradients of all it does can be pulled back by hand: every operation
on Jets has an adjoint, and no other operation of the body carries a gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsfvae.jacobian.cost import Cost
from fastsfvae.jacobian.plan.asked import Asked
from fastsfvae.jacobian.rules.jet import Jet, full_tangent, latent_jet
from fastsfvae.ops.dispatch import Choice
from fastsfvae.ops.tangent_layer import Layer


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of a plan, for reports.

    Attributes:
        op: the operation, such as "conv2d".
        path: the dotted path of the module that runs it, "" where unknown.
        handled: "rule" or "fallback" where tangents pass; "plain" elsewhere.
        shape: the result's shape, with the batch axis's traced extent.
        cost: of one tangent of one sample; nothing where none passes.
        choice: between the fused kernels and the library, where there is one.
    """

    op: str
    path: str
    handled: str
    shape: tuple[int, ...]
    cost: Cost
    choice: Choice | None = None


class Halves(NamedTuple):
    """`Plan.to_tail` in two, where all that its second half reads of a chunk is one Jet.

    Attributes:
        to_cut: (z, tensors, extras, statics, sides) -> that Jet.
        from_cut: (the Jet of any of the samples, tensors, extras, statics, sides) -> `LastLayer`.
        elements: of what the second half makes of a sample and its value, the last layer's source.
    """

    to_cut: Callable[..., Jet]
    from_cut: Callable[..., Any]
    elements: int


@dataclasses.dataclass(eq=False)
class Plan:
    """Runnable code for one decoder, one backend and one set of shapes.

    Attributes:
        source: the generated Python, readable.
        prelude: (tensors, extras) -> what the body needs that no sample changes.
        side: (z, tensors, extras, statics) -> what else the body needs, with a batch axis.
        body: (z, tensors, extras, statics, sides) -> Jet, or a Tensor where nothing depends on z.
        body_inputs: which of `tensors` the body reads itself.
        obstacles: what keeps the plan from being swept, empty where nothing does.
        steps: the operations in order.
        accepts: whether the plan is right for a batch size.
        widest: the largest tangent, in elements per sample and direction.
        total: all tangents together, likewise.
        signature: what the body reads; two plans with equal ones can take each other's inputs.
        output_shape: of one sample.
        output_dtype: likewise, under the autocast of the trace.
        to_tail: `body` up to the last layer, giving a `LastLayer`; None where nothing can take it.
        tail_from: samples of a call from which on it is taken.
        halves: of `to_tail`, for samples that are few enough for a cache behind the cut.
        fused_weights: which of `tensors` are weights of fused layers, each with its layer.
        asked: the values that it was made for.
        programs: kept for `fastsfvae.jacobian.run.sweep`.
    """

    source: str
    prelude: Callable[..., tuple]
    side: Callable[..., tuple]
    body: Callable[..., Any]
    body_inputs: list[int]
    obstacles: list[str]
    steps: list[Step]
    accepts: Callable[[int], bool]
    widest: int
    total: int
    signature: tuple
    output_shape: tuple[int, ...]
    output_dtype: torch.dtype
    to_tail: Callable[..., Any] | None = None
    tail_from: int = 1
    halves: Halves | None = None
    fused_weights: tuple[tuple[int, Layer], ...] = ()
    asked: Asked = dataclasses.field(default_factory=Asked)
    programs: dict[tuple[int, ...], Any] = dataclasses.field(default_factory=dict)

    def run(self, z: Tensor, tensors: list, extras: list, statics: tuple) -> tuple[Tensor, Tensor]:
        """Decode a chunk: (output [B, *out], tangents [m, B, *out])."""
        sides = self.side(z, tensors, extras, statics)
        result = self.body(latent_jet(z), tensors, extras, statics, sides)
        if isinstance(result, Jet):
            return result.primal, full_tangent(result)
        return result, result.new_zeros(()).expand(z.shape[1], *result.shape)
