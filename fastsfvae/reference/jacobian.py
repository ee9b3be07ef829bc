"""The Jacobian oracle: reverse mode, one output at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastsfvae.jacobian.validate import check_inputs, check_output, unwrap


def reference_jacobian(
    decoder: Callable[..., Tensor], z: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """f(z) [B, *out] and J [B, m, *out] by reverse mode over the decoder as it is.

    Every output element costs a backward pass, batched with vmap where the decoder's operations
    allow it and in a Python loop where not. Differentiable.
    """
    decoder, kwargs = unwrap(decoder, kwargs)
    check_inputs(z, [], [])
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

    output = decoder(z, *args, **kwargs)
    check_output(output, z)
    try:
        with torch.enable_grad():
            jacobian = torch.func.vmap(torch.func.jacrev(one), (0, *axes))(z, *leaves)
    except RuntimeError:
        jacobian = torch.stack(
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
        jacobian = jacobian.detach()
    return output, jacobian.movedim(-1, 1)
