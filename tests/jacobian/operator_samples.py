"""Decoders made of PyTorch's operators on PyTorch's own test samples."""

from __future__ import annotations

import gc
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from tests.jacobian.one_operator import (
    NOT_FINITE,
    NOT_JUDGED,
    NOT_SMOOTH,
    RAW,
    REFUSED,
    RIGHT,
    WRONG,
    OneOperator,
    Verdict,
    is_smooth,
    judge_decoder,
    real,
)

# PyTorch's test module forbids its process to set flags, which other tests do.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
# Its objects live as long as the process: no later collection need look at them.
gc.collect()
gc.freeze()
LARGEST = 20_000
OPERATORS = {
    f"{op.name}.{op.variant_test_name}".rstrip("."): op
    for op in op_db
    if op.supports_autograd and torch.float64 in op.supported_dtypes("cpu")
}


def judge(op: Any, dtype: torch.dtype, samples: int = 1) -> Verdict:
    """The worst verdict on an operator over that many samples, each made a decoder of."""
    verdicts = []
    judged = 0
    for decoder in decoders(op, dtype):
        verdict = judge_decoder(decoder, op.name)
        for _ in range(4):
            if verdict.reason not in (NOT_FINITE, NOT_SMOOTH):
                break
            decoder.shrink()
            verdict = judge_decoder(decoder, op.name)
        verdicts.append(Verdict(verdict.kind, f"{verdict.reason} [{decoder.described()}]"))
        if verdict.kind != NOT_JUDGED:
            judged += 1
        if judged >= samples or len(verdicts) > 12 + samples:
            break
    return worst(verdicts)


def worst(verdicts: list[Verdict]) -> Verdict:
    """Of several."""
    order = [NOT_JUDGED, RIGHT, REFUSED, RAW, WRONG]
    none = Verdict(NOT_JUDGED, "no sample fits")
    return max(verdicts, key=lambda verdict: order.index(verdict.kind), default=none)


def decoders(op: Any, dtype: torch.dtype) -> Iterator[OneOperator]:
    """Decoders of an operator: sample by sample, what depends on z and the batch axis alternate."""
    choices = itertools.cycle([("all", True), ("first", False), ("all", False), ("rest", True)])
    generated = op.sample_inputs_func(op, "cpu", dtype, True)
    samples = list(itertools.islice(generated, 150))
    if hasattr(generated, "close"):
        # What is not exhausted would end inside a trace, where its context managers cannot.
        generated.close()
    for sample in sorted(samples, key=_size):
        given = (sample.input, *sample.args), sample.kwargs
        leaves, spec = pytree.tree_flatten(given)
        # What gradients are asked of is what an operator can be differentiated by.
        smooth = [i for i, v in enumerate(leaves) if is_smooth(v) and v.requires_grad and v.numel()]
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if not smooth or sum(leaves[i].numel() for i in smooth) > LARGEST:
            continue
        if any(leaf.layout != torch.strided for leaf in leaves if isinstance(leaf, Tensor)):
            continue
        if any(leaf is not None and isinstance(leaf, torch.Generator) for leaf in leaves):
            continue

        def call(*leaves, spec=spec, sample=sample):
            (first, *args), kwargs = pytree.tree_unflatten(list(leaves), spec)
            out = op.gradcheck_wrapper(op.get_op(), first, *args, **kwargs)
            out = sample.output_process_fn_grad(out)
            return [real(result) for result in pytree.tree_leaves(out) if is_smooth(result)]

        which, batched = next(choices)
        moving = {"all": smooth, "first": smooth[:1], "rest": smooth[1:] or smooth}[which]
        try:
            results = call(*leaves)
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
        if not results or not 0 < sum(r.numel() for r in results) <= LARGEST:
            continue
        found = batched_leaves(call, leaves, moving) if batched else None
        shifted = leaves if found is None else found
        yield OneOperator(call, shifted, moving, smooth, found is not None)


def _size(sample: Any) -> tuple[bool, bool]:
    """Sorts what has axes in front, and what is large behind."""
    tensors = [t for t in pytree.tree_leaves((sample.input, sample.args)) if is_smooth(t)]
    return not any(t.ndim for t in tensors), sum(t.numel() for t in tensors) > LARGEST // 100


def batched_leaves(call, leaves, moving) -> list[Any] | None:
    """Arguments with which the operator takes a batch axis in front, None where none do."""
    ndim = leaves[moving[0]].ndim
    is_axis = [type(leaf) is int and 0 <= leaf < ndim for leaf in leaves]
    shifts = [0, -ndim, 1] if any(is_axis) else [0]
    for shift in shifts:
        moved = [v + shift if axis else v for v, axis in zip(leaves, is_axis, strict=True)]
        apart = [_nudged(leaves, moving, seed) for seed in (1, 2, 3)]
        together = [
            torch.stack([a[i] for a in apart]) if i in moving else value
            for i, value in enumerate(moved)
        ]
        try:
            singles = [call(*a) for a in apart]
            batch = call(*together)
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError):
            continue
        stacked = [torch.stack(parts) for parts in zip(*singles, strict=True)]
        same = len(stacked) == len(batch) and all(
            a.shape == b.shape and torch.allclose(a, b, 1e-12, 1e-12, equal_nan=True)
            for a, b in zip(stacked, batch, strict=True)
        )
        if same:
            return moved
    return None


def _nudged(leaves, moving, seed):
    generator = torch.Generator().manual_seed(seed)

    def nudge(leaf):
        noise = torch.randn(real(leaf).shape, dtype=real(leaf).dtype, generator=generator)
        moved = real(leaf) + 0.003 * noise
        return torch.view_as_complex(moved) if leaf.is_complex() else moved

    return [nudge(leaf) if i in moving else leaf for i, leaf in enumerate(leaves)]


def verdicts_of(name: str, samples: int = 1) -> dict[torch.dtype, Verdict]:
    """The verdicts on an operator by name, in float64 and, where it takes them, complex values."""
    op = OPERATORS[name]
    verdicts = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in (torch.float64, torch.complex128):
            if dtype in op.supported_dtypes("cpu"):
                torch.manual_seed(0)
                verdicts[dtype] = judge(op, dtype, samples)
    return verdicts
