"""Public functions on a decoder's Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae._checks import Backend
from fastsfvae.jacobian.backend import resolve_backend
from fastsfvae.jacobian.run.cache import Linearizer
from fastsfvae.jacobian.run.chunks import (
    decode_by_reference,
)
from fastsfvae.jacobian.validate import check_chunk_size, check_latents


def decode_with_jacobian(
    decoder: Callable[..., Tensor],
    z: Tensor,
    *args: Any,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Decode and differentiate: f(z) and J = df/dz, in one pass with m tangents.

    Both results are differentiable in z, in the decoder's parameters and in the further tensors;
    with backend "torch" any number of times. The decoder must treat its samples one by one.

    Args:
        decoder: an nn.Module, a method of one, or any callable; called as
            decoder(z, *args, **kwargs). Modules are traced once and the plan is kept until
            something that it depends on changes; other callables are traced at each call.
        z: latents [B, m].
        *args: further decoder inputs; tensors with leading extent B go with their samples.
        backend: "auto" is "triton" on CUDA (but for float64) and "torch" elsewhere; "reference" is
            torch.func.jacrev per sample, slow.
        chunk_size: samples that are processed together; None for as many as a memory budget
            allows. Changes results by rounding only.
        **kwargs: further decoder inputs by name.

    Returns:
        output: f(z), [B, *out].
        jacobian: [B, m, *out], a view of tangent-major storage.

    Raises:
        TypeError: z or the output is not floating point, the decoder returns no single tensor, or
            is wrapped for data-parallel training.
        ValueError: shapes, devices, dtypes, backend or chunk_size that do not fit.
        RuntimeError: batch statistics or dropout in training mode, control flow that depends on
            tensor values, or an operation that cannot be differentiated.
    """
    check_latents(z)
    check_chunk_size(chunk_size)
    if backend == "reference":
        return decode_by_reference(decoder, z, args, kwargs)
    linearizer = Linearizer(decoder, z, args, kwargs, resolve_backend(backend, z))
    parts = [linearizer.run(*bounds) for bounds in linearizer.chunks(chunk_size)]
    if len(parts) == 1:
        output, tangents = parts[0]
    else:
        output = torch.cat([output for output, _ in parts])
        tangents = torch.cat([tangents for _, tangents in parts], dim=1)
    return output, tangents.transpose(0, 1)
