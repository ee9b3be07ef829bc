"""Public functions on a decoder's Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae._checks import Backend
from fastsfvae.jacobian.backend import resolve_backend
from fastsfvae.jacobian.run.cache import Linearizer
from fastsfvae.jacobian.run.chunks import decode_by_reference, twice_differentiable
from fastsfvae.jacobian.validate import (
    Shared,
    check_chunk_size,
    check_latents,
    check_tangents,
    unwrap,
)


def decode_with_jacobian(
    decoder: Callable[..., Tensor],
    z: Tensor,
    *args: Any,
    tangents: Tensor | None = None,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    shared: Shared = (),
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Decode and differentiate: f(z) and J = df/dz, in one pass with m tangents.

    Both results are differentiable in z, in the tangents, in the decoder's parameters and in the
    further tensors; with backend "torch" any number of times. The decoder must treat its samples
    one by one.

    Args:
        decoder: an nn.Module, a method of one, or any callable; called as
            decoder(z, *args, **kwargs). Modules are traced once and the plan is kept until
            something that it depends on changes; other callables are traced at each call.
        z: latents [B, m].
        *args: further decoder inputs; tensors with leading extent B go with their samples.
        tangents: directions [k, B, m], in z's dtype; None for the m unit vectors.
        backend: "auto" is "triton" on CUDA (but for float64) and "torch" elsewhere; "reference" is
            torch.func.jacrev per sample, slow.
        chunk_size: samples that are processed together; None for as many as a memory budget
            allows. Changes results by rounding only.
        shared: further inputs that all samples share, whatever their first extent: names, and
            positions behind z, counted from 0.
        **kwargs: further decoder inputs by name.

    Returns:
        output: f(z), [B, *out].
        jacobian: [B, m, *out], a view of tangent-major storage; with tangents V the derivatives
            J V along them, [B, k, *out].

    Raises:
        TypeError: z or the output is not floating point, the decoder returns no single tensor, or
            is wrapped for data-parallel training.
        ValueError: shapes, devices, dtypes, backend or chunk_size that do not fit.
        RuntimeError: batch statistics or dropout in training mode, control flow that depends on
            tensor values, or an operation that cannot be differentiated.
    """
    check_tangents(tangents, z)
    check_chunk_size(chunk_size)
    resolved = resolve_backend(backend, z)
    # Late, like the rules: seldom needed.
    if shared != ():
        from fastsfvae.jacobian.shared import bind

        decoder, args, kwargs = bind(decoder, args, kwargs, shared)
    if tangents is not None:
        from fastsfvae.jacobian.directed import along

        decoder, z, kwargs = along(decoder, z, tangents, kwargs)
    if backend == "reference":
        return decode_by_reference(decoder, z, args, kwargs)
    linearizer = Linearizer(decoder, z, args, kwargs, resolved)
    parts = [linearizer.run(*bounds) for bounds in linearizer.chunks(chunk_size)]
    if len(parts) == 1:
        output, tangents = parts[0]
    else:
        output = torch.cat([output for output, _ in parts])
        tangents = torch.cat([tangents for _, tangents in parts], dim=1)
    return output, tangents.transpose(0, 1)


def jvp(
    decoder: Callable[..., Tensor],
    z: Tensor,
    tangents: Tensor,
    *args: Any,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    shared: Shared = (),
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Decode and differentiate along directions: f(z) and J v, by forward mode.

    One pass carries all directions; none costs more than one more decoding. Differentiable as
    `decode_with_jacobian`, in the tangents as well.

    Args:
        decoder: see `decode_with_jacobian`.
        z: latents [B, m].
        tangents: v, [B, m], or several, [k, B, m]; in z's dtype.
        *args: further decoder inputs.
        backend: see `decode_with_jacobian`.
        chunk_size: see `decode_with_jacobian`.
        shared: see `decode_with_jacobian`.
        **kwargs: further decoder inputs by name.

    Returns:
        output: f(z), [B, *out].
        derivatives: J v, [B, *out]; or [k, B, *out].

    Raises:
        TypeError, ValueError, RuntimeError: see `decode_with_jacobian`; tangents that do not fit z.
    """
    check_latents(z)
    _checks.floating("tangents", tangents)
    alone = tangents.shape == z.shape
    output, derivatives = decode_with_jacobian(
        *(decoder, z, *args),
        tangents=tangents.unsqueeze(0) if alone else tangents,
        backend=backend,
        chunk_size=chunk_size,
        shared=shared,
        **kwargs,
    )
    return output, derivatives.squeeze(1) if alone else derivatives.transpose(0, 1)


def vjp(
    decoder: Callable[..., Tensor],
    z: Tensor,
    cotangents: Tensor,
    *args: Any,
    shared: Shared = (),
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Decode and pull back: f(z) and J^T u, by reverse mode, one backward pass a cotangent.

    Differentiable like any backward pass of autograd's. The decoder is traced once, as by `jvp`,
    and refused where its samples depend on each other.

    Args:
        decoder: see `decode_with_jacobian`.
        z: latents [B, m].
        cotangents: u, [B, *out], or several, [k, B, *out].
        *args: further decoder inputs.
        shared: see `decode_with_jacobian`.
        **kwargs: further decoder inputs by name.

    Returns:
        output: f(z), [B, *out].
        pulled: J^T u, [B, m]; or [k, B, m].

    Raises:
        TypeError, ValueError, RuntimeError: see `decode_with_jacobian`; cotangents that do not fit.
    """
    check_latents(z)
    _checks.floating("cotangents", cotangents)
    target, kwargs = unwrap(decoder, kwargs)
    if shared != ():
        from fastsfvae.jacobian.shared import bind

        target, args, kwargs = bind(target, args, kwargs, shared)
    linearizer = Linearizer(target, z, args, kwargs)
    shape = (z.shape[0], *linearizer.plan(z.shape[0]).output_shape)
    alone = tuple(cotangents.shape) == shape
    if not alone and (tuple(cotangents.shape[1:]) != shape or not cotangents.shape[0]):
        raise ValueError(
            f"cotangents have shape {tuple(cotangents.shape)}: give the decoder's {shape}, or "
            f"several, [k, *{shape}] with k >= 1"
        )
    again = linearizer.needs_grad(cotangents)
    with torch.enable_grad(), twice_differentiable():
        source = z if again and z.requires_grad else z.detach().requires_grad_()
        output = target(source, *args, **kwargs)
        pulled = [
            torch.autograd.grad(
                *(output, source, u.to(output.dtype)),
                retain_graph=True,
                create_graph=again,
                materialize_grads=True,
            )[0]
            for u in (cotangents.unsqueeze(0) if alone else cotangents)
        ]
    if not again:
        output = output.detach()
    return output, pulled[0] if alone else torch.stack(pulled)
