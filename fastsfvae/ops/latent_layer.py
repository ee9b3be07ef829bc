"""A linear layer of the latents together with the activation behind it, for a sweep.

Its tangents are the weight's columns, the same for all samples: one kernel writes the stack behind
the activation, and nothing in front of it is kept. No autograd and no compiler sees these
functions, so they call the launchers themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsfvae.ops import _library, _precision

# The most latents whose layer the kernels take.
_MOST_LATENTS = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes_latents(m: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take a layer of m latents whose result has that dtype."""
    return 0 < m <= _MOST_LATENTS and dtype in _DTYPES


def stack_latents(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    params: tuple[float, ...],
    product: str = "ieee",
) -> Tensor:
    """phi(z W^T + b) and its m tangents by z in one stack; no graph of its own.

    Args:
        z: ``[B, m]``, float32, bfloat16 or float16.
        weight: ``[F, m]``, of any of these dtypes and any strides.
        bias: ``[F]`` or None.
        kind: of phi, as in `fastsfvae.ops.tangent_activation.tangent_activation`.
        params: likewise.
        product: of float32 numbers in the layer that reads it, as `Layer` has it.

    Returns:
        ``[1 + m, B, F]`` in z's dtype or autocast's.

    Raises:
        RuntimeError: a device that Triton cannot reach.
        TypeError: a dtype that the kernels do not take.
        ValueError: float64, an unknown kind, a wrong number of parameters or shapes that do not
            fit.
    """
    from fastsfvae.kernels.latent_layer import latent_layer_fwd

    _library.require_triton(z)
    dtype = _precision.layer_dtype(z)
    return latent_layer_fwd(z, weight, bias, kind, params, dtype=dtype, product=product)


def stack_latents_backward(
    grad: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    params: tuple[float, ...],
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Pullback of `stack_latents`: gradients of z, the weight and the bias, in their dtypes.

    Args:
        grad: of its result, behind the activation.
        z: as in the forward.
        weight: likewise.
        bias: likewise.
        kind: likewise.
        params: likewise.
        needs: which of the three are wanted; the others are None.
    """
    from fastsfvae.kernels.latent_layer import latent_layer_bwd

    _library.require_triton(z)
    return latent_layer_bwd(grad, z, weight, bias, kind, params, needs=needs)
