"""Public functions on a decoder's Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsfvae.jacobian.backend import resolve_backend
from fastsfvae.jacobian.run.cache import Linearizer
from fastsfvae.jacobian.run.chunks import (
    decode_by_reference,
    flatten_in_memory_order,
    map_chunks,
)
from fastsfvae.jacobian.validate import check_chunk_size, check_target


class Pullback(NamedTuple):
    """What the sampling-free objective needs of a decoder at z.

    Attributes:
        output: f(z), [B, *out].
        gram: G = J^T J, [B, m, m].
        projection: p = J^T (x - f(z)), [B, m]; None without x.
        squared_error: |x - f(z)|^2, [B]; None without x.
    """

    output: Tensor
    gram: Tensor
    projection: Tensor | None
    squared_error: Tensor | None


def decode_with_jacobian(
    decoder: Callable[..., Tensor],
    z: Tensor,
    *args: Any,
    backend: str = "auto",
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


def pullback(
    decoder: Callable[..., Tensor],
    z: Tensor,
    x: Tensor | None = None,
    *args: Any,
    backend: str = "auto",
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Pullback:
    """The m x m quantities G = J^T J, p = J^T r and r^T r at z, with r = x - f(z).

    The Jacobian is held for one chunk of samples at a time; where gradients are needed and there
    are several chunks, it is computed again in the backward. Differentiable like
    `decode_with_jacobian`.

    Args:
        decoder: see `decode_with_jacobian`.
        z: latents [B, m].
        x: data [B, *out], or None for the Gram matrix alone.
        *args: further decoder inputs.
        backend: see `decode_with_jacobian`.
        chunk_size: see `decode_with_jacobian`.
        **kwargs: further decoder inputs by name.

    Returns:
        A `Pullback`.

    Raises:
        TypeError, ValueError, RuntimeError: see `decode_with_jacobian`; x that is not floating
            point or does not match the output.
    """
    from fastsfvae.ops.gram_project import gram_project

    check_target(x, z)
    resolved = resolve_backend(backend, z)

    def finish(output: Tensor, tangents: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        if x is None:
            residual = torch.zeros_like(output)
        else:
            if x.shape[1:] != output.shape[1:]:
                raise ValueError(
                    f"x has shape {tuple(x.shape)} but the decoder returns "
                    f"{(z.shape[0], *output.shape[1:])}"
                )
            residual = x[start:stop] - output
        return output, *gram_project(*flatten_in_memory_order(tangents, residual), resolved)

    output, gram, projection, error = map_chunks(
        *(finish, decoder, z, args, kwargs), backend=resolved, chunk_size=chunk_size, also=(x,)
    )
    if x is None:
        return Pullback(output, gram, None, None)
    return Pullback(output, gram, projection, error)
