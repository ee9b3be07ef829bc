"""A decoder made of one operator, and a verdict on its J and gradients.

Values are PyTorch's, J is held against central differences of the decoder, and the gradients of
the loss against central differences of the loss, whose J has just been checked. So nothing rests
on PyTorch's derivatives, which are wrong in places.
"""

from __future__ import annotations

import linecache
import re
import traceback
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastsfvae as sf

M = 2
STEP = 1e-5
TOLERANCE = 2e-6
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


def judge_decoder(decoder: OneOperator, name: str) -> Verdict:
    """The verdict on one decoder: J, then the loss's gradients by z, log_var and parameters."""
    # Even: a chunk of one sample is traced apart.
    batch = 4 if decoder.batched else 1
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
        return explain(error, name)
    scale = max(1e-2, float(expected.abs().max()))
    if found_output.shape != output.shape or found.shape != expected.shape:
        return Verdict(WRONG, f"the shapes {tuple(found_output.shape)}, {tuple(found.shape)}")
    if not torch.allclose(found_output, output, 1e-9, 1e-9):
        return Verdict(WRONG, "the value")
    error = float((found.detach() - expected).abs().max()) / scale
    if not error < TOLERANCE:
        return Verdict(WRONG, f"J by {error:.1e}")
    return judge_gradients(decoder, z, output, name)


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


def judge_gradients(decoder: OneOperator, z: Tensor, output: Tensor, name: str) -> Verdict:
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
        return explain(error, name)
    largest = max(1.0, max(float(g.abs().max()) for g in gradients if g.numel()))
    for kinds in (("z", "log_var"), tuple(named)[2:]):
        directions = {name: torch.randn_like(named[name]) for name in kinds}
        found = sum(
            float((gradient.detach() * directions[name]).sum())
            for name, gradient in zip(named, gradients, strict=True)
            if name in directions
        )
        expected = _slope(loss, x, named, directions, STEP)
        error, allowed = abs(found - expected) / largest, 10 * TOLERANCE
        if not error < allowed:
            # Where another step says something else, rounding may.
            doubt = abs(expected - _slope(loss, x, named, directions, 3 * STEP))
            allowed += 3 * doubt / largest
        if not error < allowed:
            which = "z or log_var" if kinds[0] == "z" else "a tensor argument or its lift"
            return Verdict(WRONG, f"the gradient by {which} by {error:.1e} of the largest")
    return Verdict(RIGHT)


def _slope(loss, x, named, directions, step):
    ahead, behind = (_loss_at(loss, x, named, directions, s) for s in (step, -step))
    return (ahead - behind) / (2 * step)


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


def explain(error: Exception, name: str) -> Verdict:
    """Whether an exception is one line that this library raised and that names an operation."""
    frame, number = list(traceback.walk_tb(error.__traceback__))[-1]
    module = frame.f_globals.get("__name__", "")
    raised = linecache.getline(frame.f_code.co_filename, number).strip().startswith("raise")
    message = str(error)
    ours = module.startswith("fastsfvae") and raised and "\n" not in message
    words = re.findall(r"(?<!torch\.)\b[a-z_0-9]{3,}", message)
    named = any(hasattr(torch.ops.aten, word) or word in name for word in words)
    names = named or re.search(r"\w+\.\w+\.default", message)
    # A decoder that runs without tangents does not fail.
    kind = RAW if not ours or not names or message.startswith("the decoder fails on") else REFUSED
    where = "" if kind == REFUSED else f"{type(error).__name__} in {module}:{number}: "
    return Verdict(kind, where + first_line(error))


def first_line(error: BaseException) -> str:
    """The first line of a message, cut."""
    return (str(error).strip().split("\n") or [""])[0][:220]
