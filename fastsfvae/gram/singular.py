"""The largest singular values of a decoder's Jacobian, and their directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsfvae._checks import Backend
from fastsfvae.gram.pullback import pullback
from fastsfvae.jacobian.api import jvp, vjp
from fastsfvae.jacobian.shared import bind
from fastsfvae.jacobian.validate import Shared, check_latents

# Up to that many latents G is formed: its m tangents cost less than iterations do.
_MOST_LATENTS = 256
# Directions that are iterated besides, as the last of them converge slowest.
_MORE = 4


class SingularDirections(NamedTuple):
    """J right_i = values_i left_i for the largest singular values, in falling order.

    Attributes:
        values: in units of the output per unit of z, [B, k].
        right: unit vectors of z, [B, k, m]; of each the largest entry is positive.
        left: unit vectors of the output, [B, k, *out]; zeros where a value is 0.
        converged: [B], whether the values have settled; always where G was formed.
    """

    values: Tensor
    right: Tensor
    left: Tensor
    converged: Tensor


@torch.no_grad()
def singular_directions(
    decoder: Callable[..., Tensor],
    z: Tensor,
    k: int,
    *args: Any,
    steps: int = 50,
    tol: float = 1e-6,
    generator: torch.Generator | None = None,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    shared: Shared = (),
    **kwargs: Any,
) -> SingularDirections:
    """The k largest singular values of J at z with their directions; no gradients.

    For m up to 256 the subspace is that of G's eigenvectors; above, subspace iteration with J and
    J^T finds it, k + 4 directions at a time and never more. In the subspace the values are those of
    J itself, by QR and SVD: they are not square roots of what G has rounded.

    Args:
        decoder: see `decode_with_jacobian`.
        z: latents [B, m].
        k: directions, at most m and the numbers of one output.
        *args: further decoder inputs.
        steps: iterations at most.
        tol: largest change of a value in an iteration, relative to the largest value, from which
            on it counts as settled.
        generator: source of the iteration's first directions, on z's device.
        backend: see `decode_with_jacobian`.
        chunk_size: see `decode_with_jacobian`.
        shared: see `decode_with_jacobian`.
        **kwargs: further decoder inputs by name.

    Returns:
        `SingularDirections`, in z's dtype.

    Raises:
        TypeError, ValueError, RuntimeError: see `decode_with_jacobian`; a k out of range.
    """
    check_latents(z)
    B, m = z.shape
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= m:
        raise ValueError(f"k={k!r}: give an int from 1 to m = {m}")
    decoder, args, kwargs = bind(decoder, args, kwargs, shared)
    options: dict[str, Any] = {"backend": backend, "chunk_size": chunk_size}
    if m <= _MOST_LATENTS:
        gram = pullback(decoder, z, None, *args, **options, **kwargs).gram
        right = torch.linalg.eigh(gram.double()).eigenvectors[..., -k:].to(z.dtype)
        values, right, left, shape = _in_subspace(decoder, z, right, args, kwargs, options)
        settled = torch.ones(B, dtype=torch.bool, device=z.device)
    else:
        start = torch.randn(
            *(B, m, min(k + _MORE, m)), generator=generator, dtype=z.dtype, device=z.device
        )
        right, before = torch.linalg.qr(start).Q, z.new_zeros(B, k)
        for _ in range(max(1, steps)):
            values, right, left, shape = _in_subspace(decoder, z, right, args, kwargs, options)
            found = values[:, :k]
            settled = ((found - before).abs() <= tol * found[:, :1]).all(-1)
            # Read where that is free: on a GPU it would wait for the device.
            if z.device.type == "cpu" and bool(settled.all()):
                break
            before = found
            cotangents = left.mT.unflatten(-1, shape).transpose(0, 1)
            pulled = vjp(decoder, z, cotangents, *args, **kwargs)[1]
            right = torch.linalg.qr(pulled.permute(1, 2, 0)).Q
    if k > values.shape[1]:
        raise ValueError(f"k={k} is more than the {values.shape[1]} numbers of one output")
    rows = right[..., :k].mT
    sign = rows.gather(-1, rows.abs().argmax(-1, keepdim=True)).sign()
    values, columns = values[:, :k], left[..., :k].mT * sign
    return SingularDirections(values, rows * sign, columns.unflatten(-1, shape), settled)


def _in_subspace(
    decoder: Callable[..., Tensor],
    z: Tensor,
    basis: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """J's singular values on the span of orthonormal columns ``[B, m, k]``.

    Values ``[B, k]``, right ``[B, m, k]`` and left ``[B, n, k]`` vectors, and the extents *out.
    """
    _, derivatives = jvp(decoder, z, basis.permute(2, 0, 1), *args, **options, **kwargs)
    columns = derivatives.flatten(2).permute(1, 2, 0).to(z.dtype)
    Q, R = torch.linalg.qr(columns)
    U, values, Vh = torch.linalg.svd(R, full_matrices=False)
    left = (Q @ U) * (values > 0).unsqueeze(-2)
    return values, basis @ Vh.mT, left, derivatives.shape[2:]
