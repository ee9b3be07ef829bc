"""The Triton launchers as torch.library operators, and what refuses them.

Operators allocate their results, mutate nothing and carry no derivative of their own: the
autograd.Functions in this package's other modules call them. Each fake allocates exactly as its
launcher does. Kernels are imported at the first call, so that `import fastsfvae` needs no Triton.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastsfvae.kernels._contract import rows_dense


def require_triton(tensor: Tensor) -> None:
    """Raise unless the Triton kernels can run on this tensor.

    Raises:
        RuntimeError: the tensor is on a device that Triton cannot reach.
        ValueError: the tensor is float64.
    """
    if tensor.dtype == torch.float64:
        raise ValueError(
            'backend="triton" has no float64 kernels: use backend="torch", or float32 tensors'
        )
    if tensor.is_cuda:
        return
    if tensor.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f'backend="triton" needs CUDA tensors, got one on "{tensor.device}": move it to a GPU, '
            'use backend="torch", or set TRITON_INTERPRET=1 before Python starts (slow, CPU)'
        )


def differentiate(
    outputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[Tensor],
    create_graph: bool,
) -> Sequence[Tensor]:
    """`torch.autograd.grad` of outputs that may be missing, or depend on nothing that is wanted."""
    pairs = [
        (y, g)
        for y, g in zip(outputs, cotangents, strict=True)
        if y is not None and g is not None and y.requires_grad
    ]
    if not pairs:
        return [torch.zeros_like(t) for t in wanted]
    return torch.autograd.grad(
        [y for y, _ in pairs],
        wanted,
        [g for _, g in pairs],
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def refuse_second_order() -> None:
    """Raise, in a backward, where create_graph asks for a derivative of the kernel's gradient.

    `once_differentiable` would not do: it raises only where the cotangents carry a graph, and
    otherwise leaves the second derivative silently incomplete. A compiled backward never has one.

    Raises:
        RuntimeError: the backward runs with create_graph=True.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            'backend="triton" has first derivatives only: use backend="torch" for the second'
        )


def refuse_vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
    """The `vmap` of an operation that has none.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "torch.vmap cannot map over the loss: call it for one model at a time, "
        'or give backend="reference"'
    )


@torch.library.custom_op("fastsfvae::gram_project", mutates_args=())
def gram_project(J: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """J ``[B, m, n]``, r ``[B, n]`` -> float32 G ``[B, m, m]``, p ``[B, m]``, rr ``[B]``."""
    from fastsfvae.kernels.gram_project import gram_project_fwd

    return gram_project_fwd(J, r)


@gram_project.register_fake
def _(J, r):
    B, m, _ = J.shape
    shapes = (B, m, m), (B, m), (B,)
    return tuple(torch.empty(shape, dtype=torch.float32, device=J.device) for shape in shapes)


@torch.library.custom_op("fastsfvae::gram_project_bwd", mutates_args=())
def gram_project_bwd(
    J: Tensor, r: Tensor, M: Tensor, u: Tensor, g_rr: Tensor
) -> tuple[Tensor, Tensor]:
    """Pull M = dG + dG^T ``[B, m, m]``, u = dp ``[B, m]`` and g_rr ``[B]`` back to (dJ, dr)."""
    from fastsfvae.kernels.gram_project import gram_project_bwd

    return gram_project_bwd(J, r, M, u, g_rr)


@gram_project_bwd.register_fake
def _(J, r, M, u, g_rr):
    return torch.empty_like(rows_dense(J)), torch.empty(r.shape, dtype=r.dtype, device=r.device)


@torch.library.custom_op("fastsfvae::woodbury", mutates_args=())
def woodbury(
    G: Tensor,
    p: Tensor,
    rr: Tensor,
    h: Tensor,
    c: Tensor,
    J: Tensor | None = None,
    r: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One factorisation a sample -> (log_det, explained, K, y, q, w, lost); m <= 64.

    Lost samples are rescued where J and r are given.
    """
    from fastsfvae.kernels.woodbury import woodbury_fwd
    from fastsfvae.kernels.woodbury_float64 import rescue

    solved = woodbury_fwd(G, p, rr, h, c)
    if J is not None and r is not None:
        rescue(J, r, rr, h, c, solved)
    return (*solved,)


@woodbury.register_fake
def _(G, p, rr, h, c, J=None, r=None):
    B, m = h.shape
    sample, vector = (lambda: c.new_empty((B,))), (lambda: h.new_empty((B, m)))
    lost = h.new_empty((B,), dtype=torch.bool)
    return sample(), sample(), h.new_empty((B, m, m)), vector(), vector(), vector(), lost


@torch.library.custom_op("fastsfvae::gram_woodbury", mutates_args=())
def gram_woodbury(J: Tensor, r: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
    """`gram_project`, then `woodbury` on its partial sums: their ten results, in two launches.

    Two more rescue lost samples, if J is float32.
    """
    from fastsfvae.kernels.gram_project import gram_project_partials
    from fastsfvae.kernels.woodbury import woodbury_of_partials
    from fastsfvae.kernels.woodbury_float64 import rescue

    sums, solved = woodbury_of_partials(*gram_project_partials(J, r), h, c)
    if J.dtype == torch.float32:
        rescue(J, r, sums[2], h, c, solved)
    return [*sums, *solved]


@gram_woodbury.register_fake
def _(J, r, h, c):
    B, m = h.shape
    shapes = (B, m, m), (B, m), (B,), (B,), (B,), (B, m, m), (B, m), (B, m), (B, m)
    return [*(h.new_empty(shape) for shape in shapes), h.new_empty((B,), dtype=torch.bool)]
