"""What reverse mode gives of a decoder: p = J^T r by one pass, G where an output has few numbers.

Forward mode carries m tangents through the decoder, and reverse mode needs n passes back. A decoder
of coordinates has m = 256 and n = 1, say. The decoder itself is called: what its forward writes
into it stays, unless the caller undoes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastsfvae.jacobian.run.cache import Linearizer, chunk_bounds
from fastsfvae.jacobian.validate import check_output, check_shape, unwrap
from fastsfvae.ops.gram_project import gram_project

# Samples whose graph exists at one time on a CPU: more are no faster, and need more memory.
_SAMPLES = 1024


def projection(
    decoder: Callable[..., Tensor],
    z: Tensor,
    x: Tensor,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The projection p = J^T r and rr = r^T r, r = x - f(z), by one reverse pass, without a graph.

    Args:
        decoder: treats its samples one by one, which is not checked.
        z: latents ``[B, m]``.
        x: data ``[B, *out]``.
        args: further decoder inputs; tensors with leading extent B go with their samples.
        kwargs: likewise, by name.
        chunk_size: samples that are differentiated together; None chooses.

    Returns:
        p ``[B, m]`` and rr ``[B]``, the latter in float32 at least.

    Raises:
        TypeError, ValueError: what is no output of a decoder, or not like x.
    """
    parts = []
    for rows, own, output in _outputs(decoder, z, args, kwargs or {}, chunk_size):
        check_shape(x, output.shape)
        residual = x[rows] - output.detach()
        (p,) = _pulled([output], own, [residual.to(output.dtype)])
        wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
        parts.append((p, wide.flatten(1).square().sum(1)))
    p, rr = (torch.cat(part) for part in zip(*parts, strict=True))
    return p, rr


def gram_by_rows(
    decoder: Callable[..., Tensor],
    z: Tensor,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    *,
    chunk_size: int | None = None,
    total: bool = False,
) -> Tensor:
    """G = J^T J by a reverse pass for each number of an output, without a graph.

    Args:
        decoder: as in `projection`, like the rest; that it treats its samples one by one is checked
            as `decode_with_jacobian` does it.
        z: latents ``[B, m]``.
        args: further decoder inputs.
        kwargs: likewise, by name.
        chunk_size: samples that are differentiated together; None chooses.
        total: whether to add up G over all samples, into B = 1.

    Returns:
        G ``[B, m, m]``, in float32 at least.

    Raises:
        TypeError, ValueError, RuntimeError: see `decode_with_jacobian`.
    """
    kwargs = kwargs or {}
    Linearizer(decoder, z, args, kwargs, "torch").plan(len(z))
    parts = []
    for _, own, output in _outputs(decoder, z, args, kwargs, chunk_size):
        with torch.enable_grad():
            columns = output.flatten(1).unbind(1)
        # Samples do not depend on each other: the gradient of their sum is each one's own.
        J = torch.stack(_pulled(columns, own, [torch.ones_like(f) for f in columns]))
        # Of all samples as of one where their sum is wanted: [n, b, m] to [1, m, n b].
        J = J.flatten(0, 1).T[None] if total else J.permute(1, 2, 0)
        parts.append(gram_project(J, J.new_zeros(len(J), J.shape[2]), "torch")[0])
    G = torch.cat(parts)
    return G.sum(0, True) if total else G


def _outputs(
    decoder: Callable[..., Tensor],
    z: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
    chunk_size: int | None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their latents as a leaf, and their outputs with a graph, a chunk at a time."""
    decoder, kwargs = unwrap(decoder, kwargs)
    size = chunk_size or (len(z) if z.is_cuda else _SAMPLES)

    def own(leaf: Any, rows: slice) -> Any:
        along = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == len(z)
        return leaf[rows] if along else leaf

    for start, stop in chunk_bounds(len(z), size):
        rows = slice(start, stop)
        part = z[rows].detach().requires_grad_()
        own_args, own_kwargs = pytree.tree_map(
            lambda leaf, rows=rows: own(leaf, rows), (args, kwargs)
        )
        with torch.enable_grad():
            output = decoder(part, *own_args, **own_kwargs)
        check_output(output, part)
        yield rows, part, output


def _pulled(outputs: Any, z: Tensor, cotangents: list[Tensor]) -> list[Tensor]:
    """The gradients by z of each output for its cotangent."""
    return [
        torch.autograd.grad(f, z, cotangent, retain_graph=True, materialize_grads=True)[0]
        if f.requires_grad
        else torch.zeros_like(z)
        for f, cotangent in zip(outputs, cotangents, strict=True)
    ]
