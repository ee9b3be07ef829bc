"""Which implementation a layer's tangents take: a fused Triton kernel, or the library's product.

A fused kernel saves the pass of an activation, which reads and writes all that goes through it; the
library's product is the better one where there is none, and where a kernel's instructions and not
memory set the time. Where a layer was measured on the device at hand, the faster one is taken.
Elsewhere a model decides, and says so: see `_layer_model`.

The choice does not depend on the batch size: a decoder's plan serves all of them, whichever came
first, and gives the same bits.

Nothing was measured on a GPU yet.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch

from fastsfvae.ops._gpu import MEASURED, Gpu, gpu_of
from fastsfvae.ops._precision import allows_tf32, product_of

ENVIRONMENT = "FASTSFVAE_FUSED"
FusedLayers: TypeAlias = Literal["auto", "always", "never"]
SETTINGS: tuple[FusedLayers, ...] = get_args(FusedLayers)
# Why a layer without an activation on either side is the library's.
NO_ACTIVATION = "no activation to take in"
_forced: ContextVar[str | None] = ContextVar("fused_layers", default=None)


class Choice(NamedTuple):
    """An implementation.

    Attributes:
        how: "fused" or "library".
        why: in a few words.
        product: of float32 numbers in the fused kernel; see `fastsfvae.ops._precision.product_of`.
    """

    how: str
    why: str
    product: str = "ieee"


@contextlib.contextmanager
def fused_layers(setting: FusedLayers) -> Iterator[None]:
    """Choose inside a block whether layers run on the fused Triton kernels; a context manager.

        with sf.fused_layers("never"):
            loss(x, mean, log_var).backward()

    It goes before $FASTSFVAE_FUSED, and is read when a decoder's tangents are computed: a step that
    was captured or compiled before keeps what it has.

    Args:
        setting: "always" or "never", where the kernels take a layer at all; or "auto", which
            chooses for each layer (`check_decoder` shows what and why).

    Raises:
        ValueError: another setting.
    """
    _checked(setting, f"fused_layers({setting!r})")
    token = _forced.set(setting)
    try:
        yield
    finally:
        _forced.reset(token)


def is_forced() -> bool:
    """Whether the choice is not left to the model, so that layers take kernels for nothing saved.

    Raises:
        ValueError: an unknown $FASTSFVAE_FUSED.
    """
    return _setting()[0] != "auto"


def state() -> tuple[str, bool, bool]:
    """All that a choice depends on besides `decide`'s arguments.

    Raises:
        ValueError: an unknown $FASTSFVAE_FUSED.
    """
    return _setting()[0], allows_tf32("conv2d"), allows_tf32("linear")


def decide(
    operation: str,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    out_shape: Sequence[int],
    *,
    device: torch.device | Gpu,
    dtype: torch.dtype,
    activated: bool = True,
    of_gram: bool = False,
) -> Choice:
    """How a layer runs that a fused kernel supports, and why.

    A decoder's last layer was measured with the Gram of its Jacobian as well, as a loss asks for
    both. Where it was, that decides, and for those who want the Jacobian too: a plan has one last
    layer for all.

    Args:
        operation: the ATen name, such as "conv_transpose2d" or "linear".
        x_shape: of one sample's value, ``[C_in, ...]`` or ``[*, C_in]``.
        weight_shape: of the layer's weight.
        out_shape: of one sample's result.
        device: where it runs, on the Triton backend.
        dtype: of values and tangents.
        activated: whether there is an activation for the kernel to take in, in front or behind.
        of_gram: whether `fastsfvae.ops.gram_tail` takes the layer with its Gram, where it is fused.

    Raises:
        ValueError: an unknown $FASTSFVAE_FUSED.
    """
    setting, source = _setting()
    gpu = device if isinstance(device, Gpu) else gpu_of(device)
    if gpu is not None and gpu.capability < 80:
        return Choice("library", "no tensor cores in Triton's code for this device")
    is_full = dtype == torch.float32
    product = product_of(operation, gpu) if is_full else "ieee"
    if setting != "auto":
        return Choice("fused" if setting == "always" else "library", source, product)
    if gpu is None:
        return Choice("library", "the interpreter is slow")
    if not activated:
        return Choice("library", NO_ACTIVATION)
    used = product if is_full else "half"
    measured = MEASURED.get(gpu.name, {}).get("layers", {})
    with_gram, alone = (layer_key(operation, x_shape, weight_shape, used, g) for g in (True, False))
    if of_gram and with_gram in measured:
        return Choice(measured[with_gram], f"measured with its Gram on {gpu.name}", product)
    if alone in measured:
        return Choice(measured[alone], f"measured on {gpu.name}", product)
    if not gpu.bandwidth:
        return Choice("library", "the driver does not tell the memory's speed")
    x, out = math.prod(x_shape), math.prod(out_shape)
    # The weight's first axis counts inputs where it is transposed, and outputs elsewhere.
    per_first = x if operation.startswith("conv_transpose") else out
    flops = 2 * per_first * math.prod(weight_shape[1:])
    # The weight is read once for all values and tangents of a batch.
    # Late: where it is measured, or no GPU is there, nobody asks the model.
    from fastsfvae.ops._layer_model import fused_times, library_seconds

    sizes = flops, x * dtype.itemsize, out * dtype.itemsize
    limits = fused_times(gpu, used, *sizes)
    limit = max(limits, key=limits.__getitem__)
    share = limits[limit] / library_seconds(gpu, used, *sizes)
    how = "fused" if share < 1 else "library"
    why = f"model: fused {share:.2f} of the library's time, bound by {limit}; not measured"
    return Choice(how, why, product)


def decide_of_latents(device: torch.device) -> Choice:
    """How a linear layer of the latents and the activation behind it run, and why.

    The kernel writes what the activation's pass would, and reads less: there is nothing to weigh.

    Args:
        device: where it runs, on the Triton backend.

    Raises:
        ValueError: an unknown $FASTSFVAE_FUSED.
    """
    setting, source = _setting()
    if setting != "auto":
        return Choice("fused" if setting == "always" else "library", source)
    if gpu_of(device) is None:
        return Choice("library", "the interpreter is slow")
    return Choice("fused", "writes what its activation would, and nothing else is as large")


def layer_key(
    operation: str,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    product: str,
    of_gram: bool = False,
) -> str:
    """The name of a layer among what was measured.

    Args:
        operation: as in `decide`.
        x_shape: likewise.
        weight_shape: likewise.
        product: of float32 numbers in the kernel; "half" for half precision.
        of_gram: whether the layer is meant together with the Gram of its Jacobian.
    """
    sizes = ("x".join(map(str, shape)) for shape in (x_shape, weight_shape))
    return " ".join((operation, *sizes, product, *["gram"] * of_gram))


def _setting() -> tuple[str, str]:
    forced = _forced.get()
    if forced is not None:
        return forced, f"fused_layers({forced!r})"
    setting = os.environ.get(ENVIRONMENT) or "auto"
    return _checked(setting, f"{ENVIRONMENT}={setting}")


def _checked(setting: str, source: str) -> tuple[str, str]:
    if setting not in SETTINGS:
        raise ValueError(f"{source} is not one of {', '.join(SETTINGS)}")
    return setting, source
