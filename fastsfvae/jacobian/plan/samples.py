"""Whether a decoder decodes its samples one by one, and the same way each time.

J of one sample has no meaning otherwise. Noise is told from a trace's operations; what one sample
takes from another (a mean over the batch, a sort) is found by running the trace a few times.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from fastsfvae.jacobian.plan.functionalize import is_mutation
from fastsfvae.jacobian.plan.nodes import is_tensor, operation_name, packet_name
from fastsfvae.jacobian.plan.refuse import TRAINING_ARGUMENT, layer_name
from fastsfvae.jacobian.plan.trace import Trace

# Samples of a run: what takes part of another sample shows among so few.
_FEW = 5
# Rows that are computed from the same numbers by the same kernels differ by less, in units of the
# type's resolution; those that take part of another sample differ by all of it.
_UNITS = 64


def refuse_noise(node: fx.Node, path: str) -> None:
    """Refuse what draws at random, but for layers that do so in training only.

    Raises:
        RuntimeError: names the module, the operation and the fix.
    """
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return
    # Those have a flag, which is looked at when they are out of place.
    name = packet_name(target).removesuffix("_")
    if name in {*TRAINING_ARGUMENT, "scaled_dot_product_attention"}:
        return
    if torch.Tag.nondeterministic_seeded in target.tags:
        drops_out = _drops_out(node, target)
        if drops_out is False:
            return
        layer = layer_name(path)
        if drops_out:
            raise RuntimeError(
                f"{layer} drops out values between its layers at random: call {layer}.eval()"
            )
        raise RuntimeError(
            f"{layer} draws at random ({target}), so that it is another function at "
            "each call: pass the noise as a further input, or switch it off for the loss"
        )


def _drops_out(node: fx.Node, target: torch._ops.OpOverload) -> bool | None:
    """Whether a recurrent layer drops out values; None for any other operation."""
    names = [argument.name for argument in target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return bool(given["dropout"] and given["train"]) if "dropout" in given else None


def refuse_mixing(
    trace: Trace,
    fixed: Sequence[Tensor],
    z: Tensor,
    extras: Sequence[Tensor],
    batched: list[bool],
    advice: str = "",
) -> None:
    """Refuse a decoder in which a sample's output depends on other samples.

    Where a sample alone is decoded as among others, the trace is taken for batches of one as well.

    Args:
        trace: of the decoder.
        fixed: its parameters and buffers.
        z: latents of the traced batch size.
        extras: the tensors among the further arguments.
        batched: for each of them, whether its leading axis is the batch.
        advice: what the message adds.

    Raises:
        RuntimeError: names the first operation that mixes, and its module.
    """
    size = _FEW if z.shape[0] > _FEW and trace.accepts(_FEW) else z.shape[0]
    if size < 2 or z.device.type == "meta":
        return
    rows = torch.arange(size, device=z.device)
    # Of any two samples one is replaced and the other kept, both ways round.
    halves = [(rows >> bit & 1).bool() for bit in range((size - 1).bit_length())]
    replaced = [half for pair in ((half, ~half) for half in halves) for half in pair]
    changes = any(map(is_mutation, trace.module.graph.nodes))
    with temporarily_clear_interpreter_stack(), torch.no_grad():
        tensors, z, extras = [_plain(t) for t in fixed], _plain(z), [_plain(t) for t in extras]
        noise = _noise_like(z, size)
        # Rows that are all alike, as those of a table of zeros, show nothing in others' places.
        moves = [
            _noise_like(t, size)
            if along and t.is_floating_point() and bool((t[:size] == t[:1]).all())
            else None
            for t, along in zip(extras, batched, strict=True)
        ]

        def inputs(replaced: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor]]:
            # In place of some samples those before them, a little beside.
            count = len(replaced)
            places = torch.where(replaced, (rows[:count] - 1) % size, rows[:count])

            def beside(t: Tensor, noise: Tensor | None) -> Tensor:
                if noise is None:
                    return t[places]
                return t[places] + replaced.view(-1, *[1] * (t.ndim - 1)) * noise[:count]

            given = zip(extras, batched, moves, strict=True)
            # What the decoder writes into is the same for each run, and not the user's.
            own = [t.clone() for t in tensors] if changes else tensors
            further = [beside(t, move) if along else t for t, along, move in given]
            return own, beside(z, noise), further

        none = torch.zeros_like(rows, dtype=torch.bool)
        try:
            results = [trace.module(*inputs(chosen)) for chosen in (none, *replaced)]
            fewer = trace.module(*inputs(none[:2])) if trace.accepts(2) else results[0]
        except (RuntimeError, IndexError, ValueError):
            # What fails on latents beside the user's is no matter of theirs.
            return
        try:
            alone = trace.module(*inputs(none[:1])) if trace.accepts(2) else None
        except (RuntimeError, IndexError, ValueError):
            alone = None
        for half, result in zip(replaced, results[1:], strict=True):
            if not _same(result, results[0], ~half):
                node = _first_mixing(trace, inputs(none), inputs(half), ~half)
                raise RuntimeError(_message(trace, node) + advice)
    # Another batch size may take other kernels, which round otherwise.
    if not _same(fewer[:2], results[0][:2], rows[:2] >= 0, loose=True):
        raise RuntimeError(
            "the decoder's output for a sample depends on how many samples are in its batch: "
            f"use no size of the batch axis (shape[0], numel()) as a value{advice}"
        )
    if alone is not None and _same(alone, results[0][:1], rows[:1] >= 0, loose=True):
        trace.accepts.allow_one()


def _noise_like(tensor: Tensor, size: int) -> Tensor:
    """A little for each of the first samples, the same at every call."""
    shape, generator = (size, *tensor.shape[1:]), torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(shape, generator=generator).to(tensor.device, tensor.dtype)


def _plain(tensor: Tensor) -> Tensor:
    """A tensor without what a transform of torch.func has wrapped it in; the first of several."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        axis = functorch.maybe_get_bdim(tensor)
        tensor = functorch.get_unwrapped(tensor)
        tensor = tensor if axis < 0 else tensor.select(axis, 0)
    return tensor.detach()


def _same(value: Tensor, other: Tensor, rows: Tensor, loose: bool = False) -> bool:
    """Whether some rows are equal but for rounding; by half of the digits where `loose`."""
    if value.shape != other.shape:
        return False
    a, b = value[rows], other[rows]
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    unit = torch.finfo(a.dtype).eps * (_UNITS if torch.finfo(a.dtype).bits > 16 else 4)
    unit = max(unit, torch.finfo(a.dtype).eps ** 0.5) if loose else unit
    finite = torch.isfinite(a) & torch.isfinite(b)
    scale = torch.where(finite, b.abs(), 0).max() if b.numel() else 0
    near = torch.where(finite, (a - b).abs() <= unit * scale, torch.isnan(a) == torch.isnan(b))
    return bool(near.all())


def _first_mixing(trace: Trace, whole: tuple, changed: tuple, rows: Tensor) -> fx.Node | None:
    """The first operation whose results for some samples are others when other samples change."""
    runs = []
    for inputs in (whole, changed):
        run = _Kept(trace.module, len(rows))
        run.run(*[*inputs[0], inputs[1], *inputs[2]])
        runs.append(run.kept)
    first, second = runs
    for node, value in first.items():
        if node in second and not _same(second[node], value, rows):
            return node
    return None


class _Kept(fx.Interpreter):
    """Keeps what has the batch in front."""

    def __init__(self, module: fx.GraphModule, size: int):
        super().__init__(module, garbage_collect_values=False)
        self._size = size
        self.kept: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        value = super().run_node(n)
        if n.op == "call_function" and is_tensor(n) and value.shape[:1] == (self._size,):
            self.kept[n] = value.clone()
        return value


def _message(trace: Trace, node: fx.Node | None) -> str:
    module = layer_name(trace.paths.get(node, "") if node is not None else "")
    operation = ""
    if node is not None:
        source: Any = node.args[0] if node.target is operator.getitem else node
        operation = f" ({operation_name(source.target)})"
    return (
        f"{module} mixes the samples of a batch{operation}: each sample must be decoded from its "
        "own latents alone; reduce over other axes, or pass what is shared as a further input"
    )
