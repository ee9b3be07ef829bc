"""The Jacobian oracle: reverse mode, one output at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def jacobian(decoder: Callable[..., Tensor], z: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """J [B, m, *out] by reverse mode over the decoder as it is.

    Every output element costs a backward pass, batched with vmap where the decoder's operations
    allow it and in a Python loop where not. Differentiable.

    Args:
        decoder: maps z [B, m] to [B, *out].
        z: [B, m].
        args: further decoder inputs; tensors with leading extent B go with their samples.
        kwargs: likewise.
    """
    batch = z.shape[0]
    leaves, spec = pytree.tree_flatten((args, kwargs))
    axes = [
        0 if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch else None
        for leaf in leaves
    ]

    def one(sample: Tensor, *values: Any) -> Tensor:
        values = tuple(v[None] if axis == 0 else v for v, axis in zip(values, axes, strict=True))
        one_args, one_kwargs = pytree.tree_unflatten(values, spec)
        return decoder(sample[None], *one_args, **one_kwargs)[0]

    try:
        with torch.enable_grad():
            J = torch.func.vmap(torch.func.jacrev(one), (0, *axes))(z, *leaves)
    except RuntimeError:
        J = torch.stack(
            [
                torch.autograd.functional.jacobian(
                    lambda sample, i=i: one(
                        sample,
                        *(v[i] if axis == 0 else v for v, axis in zip(leaves, axes, strict=True)),
                    ),
                    z[i],
                    create_graph=torch.is_grad_enabled(),
                )
                for i in range(batch)
            ]
        )
    if not torch.is_grad_enabled():
        J = J.detach()
    return J.movedim(-1, 1)
