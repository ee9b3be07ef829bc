"""Apply a function to a decoder's output and tangents, a chunk of samples at a time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.plan.restore import undone
from fastsfvae.jacobian.rules.jet import Jet, from_stack, full_tangent
from fastsfvae.jacobian.run.cache import Linearizer
from fastsfvae.jacobian.validate import check_chunk_size, check_inputs, check_output, unwrap

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
    each is computed again in the backward; not inside torch.func, which keeps them all.

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
        output, jacobian = decode_by_reference(decoder, z, args, kwargs)
        return finish(output, jacobian.transpose(0, 1), 0, z.shape[0])
    linearizer = Linearizer(decoder, z, args, kwargs, backend)
    bounds = list(linearizer.chunks(chunk_size))
    if len(bounds) == 1:
        return finish(*linearizer.run(), 0, z.shape[0])
    # torch.func has no hooks, which a checkpoint takes.
    hooks = torch._C._functorch.peek_interpreter_stack() is None
    if hooks and linearizer.needs_grad(*(t for t in also if isinstance(t, Tensor))):
        parts = [linearizer.run_checkpointed(finish, *bound) for bound in bounds]
    else:
        parts = [finish(*linearizer.run(*bound), *bound) for bound in bounds]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def decode_by_reference(
    decoder: Callable[..., Tensor], z: Tensor, args: tuple, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """f(z) [B, *out] and J [B, m, *out] by the oracle; see `decode_with_jacobian`."""
    # Late: for the oracle alone.
    from fastsfvae.reference.jacobian import jacobian

    decoder, kwargs = unwrap(decoder, kwargs)
    check_inputs(z, [], [])
    with _eager(), twice_differentiable():
        output = decoder(z, *args, **kwargs)
        check_output(output, z)
        # What a decoder stores inside torch.func is of no use outside. A compiler cannot look.
        compiling = torch.compiler.is_compiling()
        with contextlib.nullcontext() if compiling else undone(decoder):
            return output, jacobian(decoder, z, args, kwargs)


def twice_differentiable() -> contextlib.AbstractContextManager[Any]:
    """Run attention unfused, as PyTorch's fused ones have no second derivative."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    # Late: a slow import, for the oracle alone.
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Run compiled parts as they were, as torch.func cannot run them compiled."""
    # Nothing is compiled without this import, a slow one.
    if torch.compiler.is_compiling() or "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def flatten_in_memory_order(tangents: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """J [B, m, n] and r [B, n] with the order of n that makes J a view of the tangents.

    G and p do not care about the order of n, so the small residual is permuted, never J.

    Args:
        tangents: [m, B, *out], in any memory format.
        residual: [B, *out].

    Returns:
        (J, r): J is a view of `tangents` wherever its trailing axes are dense in some order.
    """
    order = memory_order(tangents)
    J = tangents.permute(0, 1, *(2 + axis for axis in order)).flatten(2).transpose(0, 1)
    return J, residual.permute(0, *(1 + axis for axis in order)).flatten(1)


def memory_order(tangents: Tensor) -> list[int]:
    """The axes of *out in [m, B, *out], the slowest in memory first."""
    strides = tangents.stride()[2:]
    return sorted(range(len(strides)), key=lambda axis: -strides[axis])


def empty_gradient(output: Jet) -> tuple[Jet, Tensor, Tensor]:
    """Memory for the gradient of a value and its tangents, and flat views of both parts.

    Returns:
        (gradient, dJ [B, m, n], df [B, n]): in the order of n that `flatten_in_memory_order`
        takes for `output`. What is written into dJ and df is in the gradient, whatever the
        strides of the output.
    """
    tangent = full_tangent(output)
    order = memory_order(tangent)
    sizes = [tangent.shape[2 + axis] for axis in order]
    back = [order.index(axis) for axis in range(len(order))]

    def shaped(flat: Tensor) -> Tensor:
        lead = flat.ndim - 1
        axes = (*range(lead), *(lead + axis for axis in back))
        return flat.view(*flat.shape[:lead], *sizes).permute(axes)

    m, b = tangent.shape[:2]
    n = output.primal[0].numel()
    if output.stack is not None:
        flat = tangent.new_empty((1 + m, b, n))
        return from_stack(shaped(flat)), flat[1:].transpose(0, 1), flat[0]
    of_tangent, of_value = tangent.new_empty((m, b, n)), output.primal.new_empty((b, n))
    gradient = Jet(shaped(of_value), shaped(of_tangent))
    return gradient, of_tangent.transpose(0, 1), of_value
