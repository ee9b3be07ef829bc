"""G, p and rr where an output has fewer numbers than the latent: J by one reverse pass for each.

Forward mode carries m tangents through the decoder, and reverse mode needs n passes back. A decoder
of coordinates has m = 256 and n = 1, say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastsfvae.jacobian.plan.restore import undone
from fastsfvae.jacobian.run.cache import Linearizer, chunk_bounds
from fastsfvae.jacobian.validate import check_output, check_shape, unwrap
from fastsfvae.ops.gram_project import gram_project

Sums = tuple[Tensor, Tensor, Tensor]
# Samples whose graph exists at one time: more are no faster on a CPU, and need more memory.
_SAMPLES = 1024


def reverse_sums(
    decoder: Callable[..., Tensor],
    z: Tensor,
    x: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    chunk_size: int | None,
    total: bool,
) -> Sums:
    """G = J^T J, p = J^T (x - f(z)) and rr = |x - f(z)|^2, without a graph.

    Args:
        decoder: treats its samples one by one.
        z: latents ``[B, m]``.
        x: data ``[B, *out]``.
        args: further decoder inputs; tensors with leading extent B go with their samples.
        kwargs: likewise, by name.
        chunk_size: samples that are differentiated together; None chooses.
        total: whether the samples' sums are added up, and B = 1 in what is returned.

    Returns:
        G ``[B, m, m]``, p ``[B, m]`` and rr ``[B]``, in float32 at least.

    Raises:
        TypeError, ValueError, RuntimeError: see `decode_with_jacobian`; x that is not like f(z).
    """
    decoder, kwargs = unwrap(decoder, kwargs)
    # A trace refuses what has no Jacobian of its own, such as batch statistics.
    Linearizer(decoder, z, args, kwargs, "torch").plan(len(z))
    parts = []
    with undone(decoder):
        for start, stop in chunk_bounds(len(z), chunk_size or _SAMPLES):
            rows = slice(start, stop)
            own_args, own_kwargs = take((args, kwargs), len(z), rows)
            J, r = _jacobian(decoder, z[rows], x[rows], own_args, own_kwargs)
            if total:
                # Of all samples as of one: [n, b, m] to [1, m, n b].
                J, r = J.flatten(0, 1).T[None], r.T.reshape(1, -1)
            else:
                J = J.permute(1, 2, 0)
            parts.append(gram_project(J, r, "torch"))
    G, p, rr = (torch.cat(part) for part in zip(*parts, strict=True))
    return (G.sum(0, True), p.sum(0, True), rr.sum(0, True)) if total else (G, p, rr)


def take(inputs: Any, batch: int, rows: Any) -> Any:
    """Further decoder inputs for some samples of a batch: of tensors with its extent the rows."""

    def taken(leaf: Any) -> Any:
        along = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        return leaf[rows] if along else leaf

    return pytree.tree_map(taken, inputs)


def _jacobian(decoder: Callable, z: Tensor, x: Tensor, args: tuple, kwargs: dict[str, Any]):
    """The rows of J, ``[n, b, m]``, and r = x - f(z), ``[b, n]``."""
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        output = decoder(z, *args, **kwargs)
        check_output(output, z)
        check_shape(x, output.shape)
        columns = output.flatten(1).unbind(1)
    residual = (x - output.detach()).flatten(1)
    if not output.requires_grad:
        return z.new_zeros(len(columns), *z.shape), residual
    ones = torch.ones_like(columns[0])
    rows = [
        # Samples do not depend on each other: the gradient of their sum is each one's own.
        torch.autograd.grad(f, z, ones, retain_graph=True, materialize_grads=True)[0]
        for f in columns
    ]
    return torch.stack(rows), residual
