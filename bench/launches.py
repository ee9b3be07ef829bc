"""What the paper's workloads launch, recorded without a GPU."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves

import fastsfvae as sf
from bench.counting import counted_launches
from bench.l2_cache import Span, spans_of
from bench.peers import SETTINGS, loss_and_gradients
from bench.problems import build_problem, products
from fastsfvae import fused_layers as fused
from fastsfvae import kernels
from fastsfvae.jacobian.run import sweep
from fastsfvae.kernels._launch import DeviceLimits
from fastsfvae.kernels._record import Launch, recorded

# The paper's workloads that run on the kernels, and a batch that stands for all sizes.
PAPER = ("celeba16", "mnist2", "collapse200")
BATCH = 64


class Other(NamedTuple):
    """One of PyTorch's own launches.

    Attributes:
        name: of the operation.
        spans: the memory of its tensors.
    """

    name: str
    spans: list[Span]

    @property
    def moved(self) -> int:
        """Bytes that it reads or writes."""
        return sum(span.bytes for span in self.spans)


class Step(NamedTuple):
    """What one step launches.

    Attributes:
        kernels: this library's, in order.
        others: PyTorch's own, by name and number; none where they were not asked for.
        order: both in order; of the kernels alone where the others were not asked for.
    """

    kernels: list[Launch]
    others: Counter[str]
    order: list[Launch | Other]


def import_kernels() -> None:
    """Import every kernel: once the interpreter is named, they would be the interpreter's."""
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")


def step(
    workload: str,
    dtype: str,
    limits: DeviceLimits,
    batch: int = BATCH,
    *,
    others: bool = False,
    divides: int = 0,
    layers: str = "always",
) -> Step:
    """Launches of decoder and loss, forward and backward, all samples at once.

    Args:
        workload: one of `WORKLOADS`.
        dtype: "bfloat16" (autocast), "tf32" or "float32".
        limits: of the card that launchers choose for.
        batch: samples.
        others: whether to record PyTorch's launches as well.
        divides: bytes of L2 of a card that has the step captured, so that the last layers may run
            on a few samples at a time; 0 for all samples at once.
        layers: which are fused, as in `fastsfvae.fused_layers`; "auto" fuses none without a GPU.
    """
    import_kernels()
    problem = build_problem(workload, batch)
    loss = sf.SamplingFreeLoss(
        problem.decoder, reduction="sum", backend="triton", chunk_size=batch, **SETTINGS
    )
    counted: Counter[str] = Counter()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, TRITON_INTERPRET="1"))
        stack.enter_context(products(dtype))
        stack.enter_context(fused(layers))
        stack.enter_context(_captured(divides))
        with recorded(limits) as launches:
            loss_and_gradients(loss, problem, dtype)
        order: list[Any] = launches
        if others:
            # Again: the first time a plan is made, once and for all.
            with (
                recorded(limits) as order,
                counted_launches(told=lambda *call: order.append(other_launch(*call))) as counted,
            ):
                loss_and_gradients(loss, problem, dtype)
    return Step([x for x in order if isinstance(x, Launch)], counted, order)


def divides_with(l2: int) -> bool:
    """Whether a captured step takes few samples at a time, on a card of so many bytes of L2."""
    with _captured(l2):
        return sweep.divides_on(torch.device("cuda"))


@contextmanager
def _captured(l2: int) -> Iterator[None]:
    with (
        mock.patch.dict(os.environ, {sweep.DIVIDE: "1"}),
        mock.patch.object(sweep, "cache_bytes", lambda device: l2),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
    ):
        yield


def other_launch(operation: Any, given: tuple[tuple, dict], result: Any) -> Other:
    """Describe a launch: what it is given is read, but for what it writes in place."""
    schema = operation._schema.arguments
    arguments = [*zip(schema, given[0], strict=False)]
    arguments += [(a, given[1][a.name]) for a in schema if a.name in given[1]]
    spans: dict[tuple[int, int], Span] = {}
    for argument, value in (*arguments, (None, result)):
        written = argument is None or bool(argument.alias_info and argument.alias_info.is_write)
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor):
                # The result of an operation in place is its argument once more.
                spans |= {s[:2]: s for s in spans_of(tensor, written)}
    return Other(operation.overloadpacket.__name__, list(spans.values()))
