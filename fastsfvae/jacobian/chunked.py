"""Apply a function to a decoder's output and tangents, a chunk of samples at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.linearize import Linearizer
from fastsfvae.jacobian.reference import reference_jacobian
from fastsfvae.jacobian.validate import check_chunk_size

Finish = Callable[[Tensor, Tensor, int, int], tuple[Tensor, ...]]


def map_chunks(
    finish: Finish,
    decoder: Callable[..., Tensor],
    z: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    backend: str,
    chunk_size: int | None,
    also: tuple[Any, ...] = (),
) -> tuple[Tensor, ...]:
    """Concatenate ``finish(output, tangents, start, stop)`` over chunks of samples.

    One chunk's tangents exist at a time: where a gradient is needed and there are several chunks,
    each is computed again in the backward.

    Args:
        finish: maps output ``[b, *out]`` and tangents ``[m, b, *out]`` of the samples from start to
            stop to tensors with leading extent b.
        decoder: see `decode_with_jacobian`.
        z: ``[B, m]``.
        args: further decoder inputs.
        kwargs: further decoder inputs by name.
        backend: resolved: "torch", "triton" or "reference".
        chunk_size: None for a memory budget.
        also: what `finish` reads besides and a gradient may be wanted of.
    """
    check_chunk_size(chunk_size)
    if backend == "reference":
        output, jacobian = reference_jacobian(decoder, z, *args, **kwargs)
        return finish(output, jacobian.transpose(0, 1), 0, z.shape[0])
    linearizer = Linearizer(decoder, z, args, kwargs, backend)
    bounds = list(linearizer.chunks(chunk_size))
    if len(bounds) == 1:
        return finish(*linearizer.run(), 0, z.shape[0])
    if linearizer.needs_grad(*(t for t in also if isinstance(t, Tensor))):
        parts = [linearizer.run_checkpointed(finish, *bound) for bound in bounds]
    else:
        parts = [finish(*linearizer.run(*bound), *bound) for bound in bounds]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))
