"""A continuous piecewise affine decoder along straight lines: its knots, values and slopes.

A layer of a line's piece is v + b (s - at), with a value v at a point `at` of the piece and a slope
b. An affine layer maps both; an activation cuts a piece where a unit crosses one of its thresholds,
and scales b by its own slope. So all knots are found, layer by layer, each as the root of an affine
function in float64. The values and slopes carry gradients to the decoder's parameters. The knots
carry none: an integral over all pieces does not depend on where a continuous integrand is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Numbers that a layer may have on all pieces together: 1 GiB of float64.
_MOST_NUMBERS = 2**27
# Where no posterior is: a knot beyond would square to infinity.
_FAR = 1e100
_OTHERWISE = "use log_marginal_likelihood or sampled_elbo"
_TAKEN = "Linear, convolutions, ReLU, LeakyReLU, PReLU, ReLU6, Hardtanh, Flatten, Unflatten"

_AFFINE: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Flatten, nn.Unflatten, nn.Identity),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
# Between and beyond an activation's thresholds: its slopes.
_Cut = tuple[tuple[float, ...], tuple[Any, ...]]
_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], _Cut]] = {
    nn.ReLU: lambda _: ((0.0,), (0.0, 1.0)),
    nn.LeakyReLU: lambda layer: ((0.0,), (layer.negative_slope, 1.0)),
    nn.PReLU: lambda layer: ((0.0,), (layer.weight.double(), 1.0)),
    # ReLU6 is one of these.
    nn.Hardtanh: lambda layer: ((layer.min_val, layer.max_val), (0.0, 1.0, 0.0)),
}


class Pieces(NamedTuple):
    """P pieces of some lines origin + s direction, in float64; in order along each line.

    Attributes:
        line: ``[P]``, int64, the line that a piece is part of.
        left: ``[P]``, where it begins; the first of a line at -inf.
        right: ``[P]``, where it ends; the last of a line at inf.
        at: ``[P]``, a point s of it: its middle, or one near its only knot, or 0.
        value: ``[P, *out]``, f there.
        slope: ``[P, *out]``, df/ds on the piece.
    """

    line: Tensor
    left: Tensor
    right: Tensor
    at: Tensor
    value: Tensor
    slope: Tensor


def trace(decoder: nn.Module, origin: Tensor, direction: Tensor) -> Pieces:
    """Cut lines in the latent space where the decoder is not affine.

    Args:
        decoder: f, an ``nn.Sequential`` (of such) of what `layers` takes.
        origin: ``[K, m]``, float64.
        direction: ``[m]``, float64, of all lines.

    Raises:
        TypeError: for a layer that is not known to be continuous piecewise affine.
        ValueError: for a layer in training mode, or pieces that are too many.
    """
    K = len(origin)
    far = torch.full((K,), math.inf, dtype=torch.float64, device=origin.device)
    pieces = Pieces(
        torch.arange(K, device=origin.device),
        *(-far, far, torch.zeros_like(far), origin, direction.expand_as(origin)),
    )
    # Nothing here is a layer whose eight bits would do.
    with torch.autocast(origin.device.type, enabled=False):
        for name, layer in layers(decoder):
            pieces = _through(pieces, name, layer)
    return pieces


def latent_dim(decoder: nn.Module) -> int:
    """m, which the first layer of a known input size tells.

    Raises:
        TypeError: where none tells it, or as `layers`.
    """
    for _, layer in layers(decoder):
        if isinstance(layer, nn.Linear):
            return layer.in_features
        if isinstance(layer, nn.Unflatten):
            return math.prod(layer.unflattened_size)
    raise TypeError(f"decoder {_named(decoder)} has no Linear layer, which tells m: {_OTHERWISE}")


def layers(decoder: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of nested ``nn.Sequential`` one after another, each with its name.

    Raises:
        TypeError: for one that is not known to be continuous piecewise affine.
        ValueError: for one whose training mode is not.
    """
    if not isinstance(decoder, nn.Module):
        raise TypeError(
            f"decoder is a {type(decoder).__name__}, whose pieces are not known: give an "
            f"nn.Sequential, or {_OTHERWISE}"
        )
    called = f"layer {name!r}, {_named(decoder)}," if name else f"decoder {_named(decoder)}"
    if isinstance(decoder, nn.Sequential) and _runs(decoder, (nn.Sequential,)):
        # What it runs, in order: `named_children` gives a layer that stands there twice once.
        for key, child in zip(decoder._modules, decoder, strict=True):
            yield from layers(child, f"{name}.{key}".lstrip("."))
        return
    if not _runs(decoder, (*_AFFINE, *_ACTIVATIONS)):
        what = "has hooks" if _hooks(decoder) else "is not known to be piecewise affine"
        raise TypeError(f"{called} {what}: give an nn.Sequential of {_TAKEN}, or {_OTHERWISE}")
    if getattr(decoder, "track_running_stats", True) is False:
        raise ValueError(f"{called} mixes its samples: {_OTHERWISE}")
    # What is updated at a call, or is noise, is neither in evaluation mode.
    if decoder.training and (any(True for _ in decoder.buffers()) or _drops(decoder)):
        raise ValueError(f"{called} is in training mode: call decoder.eval()")
    yield name, decoder


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def _named(module: nn.Module) -> str:
    return type(module).__name__


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _runs(module: nn.Module, known: tuple[type[nn.Module], ...]) -> bool:
    """Whether a call is what one of the known classes defines, with nothing hooked to it."""
    if _hooks(module):
        return False
    forward = getattr(module.forward, "__func__", None)
    return any(isinstance(module, k) and forward is k.forward for k in known)


def _through(pieces: Pieces, name: str, layer: nn.Module) -> Pieces:
    make = next((make for kind, make in _ACTIVATIONS.items() if _runs(layer, (kind,))), None)
    if make is None:
        return _affine(pieces, name, layer)
    thresholds, slopes = make(layer)
    pieces = _cut(pieces, thresholds)
    # In place, a layer would write into what the slopes' graph has kept.
    value = _call(layer, pieces.value.clone() if layer.__dict__.get("inplace") else pieces.value)
    factor = torch.as_tensor(slopes[0], dtype=value.dtype, device=value.device)
    factor = factor.view(-1, *[1] * (value.dim() - 2))
    for threshold, above in zip(thresholds, slopes[1:], strict=True):
        # A number takes the tensor's float64.
        factor = torch.where(pieces.value > threshold, above, factor)
    return pieces._replace(value=value, slope=factor * pieces.slope)


def _affine(pieces: Pieces, name: str, layer: nn.Module) -> Pieces:
    shape, size = pieces.value.shape, getattr(layer, "kernel_size", None)
    # A convolution without a batch axis would take the pieces for channels.
    fits = size is None or len(shape) == len(size) + 2
    value = _call(layer, pieces.value) if fits else pieces.value
    if not fits or value.dim() < 2 or len(value) != shape[0]:
        raise ValueError(
            f"layer {name!r}, {layer}, is given {tuple(shape[1:])} of each sample: let it treat "
            "samples one by one, with their batch axis in front"
        )
    _check_size(len(value), value[0].numel())
    slope = _call(layer, pieces.slope) - _call(layer, torch.zeros_like(pieces.slope[:1]))
    return pieces._replace(value=value, slope=slope)


def _call(layer: nn.Module, value: Tensor) -> Tensor:
    """What the layer gives in float64, with gradients to its own parameters."""
    given = dict(layer.named_parameters()) | dict(layer.named_buffers())
    wide = {k: t.double() if t.dtype.is_floating_point else t for k, t in given.items()}
    return torch.func.functional_call(layer, wide, (value,))


@torch.no_grad()
def _roots(pieces: Pieces, thresholds: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Where any unit crosses a threshold within its piece: the piece and the place, ``[R]``."""
    value, slope = pieces.value.flatten(1), pieces.slope.flatten(1)
    found = []
    for threshold in thresholds:
        place = pieces.at[:, None] + (threshold - value) / slope
        # A flat unit's quotient is infinite or NaN, and in no piece.
        within = (place > pieces.left[:, None]) & (place < pieces.right[:, None])
        row, unit = (within & (place.abs() < _FAR)).nonzero(as_tuple=True)
        found.append((row, place[row, unit]))
    rows, places = zip(*found, strict=True)
    return torch.cat(rows), torch.cat(places)


def _cut(pieces: Pieces, thresholds: tuple[float, ...]) -> Pieces:
    roots, places = _roots(pieces, thresholds)
    row = torch.cat([torch.arange(len(pieces.line), device=roots.device), roots])
    left = torch.cat([pieces.left, places])
    order = left.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    row, left = row[order], left[order]
    # A piece ends where the next one begins, the last part of it where it ended.
    last = torch.ones_like(row, dtype=torch.bool)
    last[:-1] = row[1:] != row[:-1]
    right = torch.where(last, pieces.right[row], left.roll(-1))
    whole = right > left
    row, left, right = row[whole], left[whole], right[whole]
    _check_size(len(row), pieces.value[0].numel())
    # Of an outer piece a point well within: at the knot itself a unit is on its own threshold.
    begin = torch.where(left.isinf(), right - 2 * (1 + right.abs()), left)
    end = torch.where(right.isinf(), left + 2 * (1 + left.abs()), right)
    at = torch.where(left.isinf() & right.isinf(), 0.0, 0.5 * (begin + end))
    moved = (at - pieces.at[row]).view(-1, *[1] * (pieces.value.dim() - 1))
    slope = pieces.slope[row]
    return Pieces(pieces.line[row], left, right, at, pieces.value[row] + moved * slope, slope)


def _check_size(count: int, numbers: int) -> None:
    if count * numbers > _MOST_NUMBERS:
        raise ValueError(
            f"the decoder has {count} pieces of {numbers} numbers, which is more than "
            f"{_MOST_NUMBERS}: take a smaller one, or {_OTHERWISE}"
        )
