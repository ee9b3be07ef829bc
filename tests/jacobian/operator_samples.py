"""Decoders made of one operator of PyTorch on its own test samples, and a verdict on each.

Values are PyTorch's, J is held against central differences of the decoder, and the gradients of
the loss against central differences of the loss, whose J has just been checked. So nothing rests
on PyTorch's derivatives, which are wrong in places.
"""

from __future__ import annotations

import itertools
import linecache
import re
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

import fastsfvae as sf

M = 2
STEP = 1e-5
TOLERANCE = 2e-6
LARGEST = 20_000
OPERATORS = {
    f"{op.name}.{op.variant_test_name}".rstrip("."): op
    for op in op_db
    if op.supports_autograd and torch.float64 in op.supported_dtypes("cpu")
}
NOT_JUDGED, RIGHT, REFUSED, RAW, WRONG = "not judged", "right", "refused", "raw error", "wrong"


NOT_FINITE, NOT_SMOOTH = "not finite at the sample", "not smooth at the sample"


class Verdict(NamedTuple):
    """What became of one decoder, the worst last among the constants above."""

    kind: str
    reason: str = ""


class OneOperator(nn.Module):
    """z -> the operator's results, flat, its tensors being affine in z or parameters.

    Args:
        call: takes the leaves of the sample's arguments, gives a list of real tensors.
        leaves: of the sample's arguments.
        moving: which of the leaves depend on z.
        smooth: which of the leaves may require gradients.
        batched: whether tensors get z's batch axis in front; else there is one sample without it.
    """

    def __init__(self, call, leaves, moving, smooth, batched):
        super().__init__()
        self.call, self.leaves, self.moving, self.batched = call, list(leaves), moving, batched
        self.smooth = smooth
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and index not in smooth:
                self.register_buffer(f"fixed_{index}", leaf)
            elif isinstance(leaf, Tensor):
                self.register_parameter(f"base_{index}", nn.Parameter(real(leaf).clone()))
            if index in moving:
                lift = 0.3 * torch.randn(M, real(leaf).numel(), dtype=real(leaf).dtype)
                self.register_parameter(f"lift_{index}", nn.Parameter(lift))

    def arguments(self, z):
        filled = []
        for index, leaf in enumerate(self.leaves):
            value = leaf
            if isinstance(leaf, Tensor) and index not in self.smooth:
                value = getattr(self, f"fixed_{index}")
            elif isinstance(leaf, Tensor):
                value = getattr(self, f"base_{index}")
                if index in self.moving:
                    moved = z @ getattr(self, f"lift_{index}")
                    shape = (-1, *value.shape) if self.batched else value.shape
                    value = value + moved.reshape(shape)
                if leaf.is_complex():
                    value = torch.view_as_complex(value)
            filled.append(value)
        return filled

    @torch.no_grad()
    def shrink(self):
        """Move the tensors away from the ends of what an operator is defined on."""
        for index in self.smooth:
            getattr(self, f"base_{index}").mul_(0.6)

    def described(self) -> str:
        """The arguments: z[shape] where it depends on z."""
        words = []
        for index, leaf in enumerate(self.leaves):
            shape = str(list(leaf.shape)) if isinstance(leaf, Tensor) else str(leaf)
            letter = "z" if index in self.moving else "p" if index in self.smooth else "c"
            words.append(letter + shape if isinstance(leaf, Tensor) else shape)
        return ("B, " if self.batched else "") + ", ".join(words)

    def forward(self, z):
        lead = z.shape[0] if self.batched else 1
        results = self.call(*self.arguments(z))
        return torch.cat([result.reshape(lead, -1) for result in results], 1)


def is_smooth(value: Any) -> bool:
    """Whether it is a tensor with real or complex values."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def real(tensor: Tensor) -> Tensor:
    """Complex values as pairs of real ones."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def judge(op: Any, dtype: torch.dtype, samples: int = 1) -> Verdict:
    """The worst verdict on an operator over that many samples, each made a decoder of."""
    verdicts = []
    judged = 0
    for decoder in decoders(op, dtype):
        verdict = judge_decoder(decoder, op)
        for _ in range(3):
            if verdict.reason not in (NOT_FINITE, NOT_SMOOTH):
                break
            decoder.shrink()
            verdict = judge_decoder(decoder, op)
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


def judge_decoder(decoder: OneOperator, op: Any) -> Verdict:
    """The verdict on one decoder: J, then the loss's gradients by z, log_var and parameters."""
    batch = 3 if decoder.batched else 1
    z = 0.03 * torch.randn(batch, M, dtype=torch.float64)
    dtype = next(decoder.parameters()).dtype
    z = z.to(dtype)
    try:
        output = decoder(z)
        expected, unsure = differences(decoder, z)
    except Exception as error:
        return Verdict(NOT_JUDGED, f"the decoder itself fails: {first_line(error)}")
    if not output.isfinite().all() or not expected.isfinite().all():
        return Verdict(NOT_JUDGED, NOT_FINITE)
    if not torch.equal(decoder(z), output):
        return Verdict(NOT_JUDGED, "not deterministic")
    if unsure:
        return Verdict(NOT_JUDGED, NOT_SMOOTH)
    try:
        found_output, found = sf.decode_with_jacobian(decoder, z)
    except Exception as error:
        return explain(error, op)
    scale = max(1.0, float(expected.abs().max()))
    if found_output.shape != output.shape or found.shape != expected.shape:
        return Verdict(WRONG, f"the shapes {tuple(found_output.shape)}, {tuple(found.shape)}")
    if not torch.allclose(found_output, output, 1e-9, 1e-9):
        return Verdict(WRONG, "the value")
    error = float((found - expected).abs().max()) / scale
    if not error < TOLERANCE:
        return Verdict(WRONG, f"J by {error:.1e}")
    return judge_gradients(decoder, z, output, op)


def differences(function, z: Tensor) -> tuple[Tensor, bool]:
    """J [B, m, n] by central differences, and whether two steps or two sides disagree on it."""
    rows, unsure = [], False
    with torch.no_grad():
        middle = function(z)
        for direction in torch.eye(M, dtype=z.dtype):
            found = []
            for step in (STEP, 3 * STEP):
                ahead, behind = function(z + step * direction), function(z - step * direction)
                found.append((ahead - behind) / (2 * step))
                sides = (ahead - middle) / step - (middle - behind) / step
                unsure |= bool((sides.abs() > 1e-2 * (1 + found[-1].abs().max())).any())
            scale = max(1.0, float(found[0].abs().max()))
            unsure |= bool(((found[0] - found[1]).abs() > TOLERANCE / 2 * scale).any())
            rows.append(found[0])
    return torch.stack(rows, 1), unsure


def judge_gradients(decoder: OneOperator, z: Tensor, output: Tensor, op: Any) -> Verdict:
    """The verdict on the loss's gradients, along random directions of all leaves."""
    x = output.detach() + torch.randn_like(output)
    log_var = 0.3 * torch.randn_like(z)
    named = {"z": z, "log_var": log_var, **dict(decoder.named_parameters())}
    loss = sf.SamplingFreeLoss(decoder, backend="torch", chunk_size=2)
    leaves = [t.detach().clone().requires_grad_() for t in (z, log_var)]
    try:
        value = loss(x, *leaves)
        wanted = [*leaves, *decoder.parameters()]
        gradients = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
    except Exception as error:
        return explain(error, op)
    largest = max(1.0, max(float(g.abs().max()) for g in gradients if g.numel()))
    for kinds in (("z", "log_var"), tuple(named)[2:]):
        directions = {name: torch.randn_like(named[name]) for name in kinds}
        found = sum(
            float((gradient * directions[name]).sum())
            for name, gradient in zip(named, gradients, strict=True)
            if name in directions
        )
        expected = []
        for step in (STEP, 3 * STEP):
            sides = [_loss_at(loss, x, named, directions, sign * step) for sign in (1, -1)]
            expected.append((sides[0] - sides[1]) / (2 * step))
        doubt = abs(expected[0] - expected[1])
        error = abs(found - expected[0]) / largest
        if not error < 10 * TOLERANCE + 3 * doubt / largest:
            which = "z or log_var" if kinds[0] == "z" else "a tensor argument or its lift"
            return Verdict(WRONG, f"the gradient by {which} by {error:.1e} of the largest")
    return Verdict(RIGHT)


@torch.no_grad()
def _loss_at(loss, x, named, directions, step):
    before = {name: named[name].detach().clone() for name in directions}
    try:
        for name, direction in directions.items():
            named[name].add_(step * direction)
        return float(loss(x, named["z"], named["log_var"]))
    finally:
        for name, value in before.items():
            named[name].copy_(value)


def explain(error: Exception, op: Any) -> Verdict:
    """Whether an exception is one line that this library raised and that names an operation."""
    frame, number = list(traceback.walk_tb(error.__traceback__))[-1]
    module = frame.f_globals.get("__name__", "")
    raised = linecache.getline(frame.f_code.co_filename, number).strip().startswith("raise")
    message = str(error)
    ours = module.startswith("fastsfvae") and raised and "\n" not in message
    words = re.findall(r"(?<!torch\.)\b[a-z_0-9]{3,}", message)
    names = any(hasattr(torch.ops.aten, word) or word in op.name for word in words)
    # A decoder that runs without tangents does not fail.
    kind = RAW if not ours or not names or message.startswith("the decoder fails on") else REFUSED
    where = "" if kind == REFUSED else f"{type(error).__name__} in {module}:{number}: "
    return Verdict(kind, where + first_line(error))


def first_line(error: BaseException) -> str:
    """The first line of a message, cut."""
    return (str(error).strip().split("\n") or [""])[0][:220]


def verdict_of(name: str, samples: int = 1) -> Verdict:
    """The verdict on an operator by name, in float64 and, where it takes them, complex values."""
    op = OPERATORS[name]
    verdicts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in (torch.float64, torch.complex128):
            if dtype in op.supported_dtypes("cpu"):
                torch.manual_seed(0)
                kind, reason = judge(op, dtype, samples)
                label = "complex: " if dtype.is_complex else ""
                verdicts.append(Verdict(kind, label + reason))
    return worst(verdicts)
