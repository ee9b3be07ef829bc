"""The m x m factorisation by its Triton kernel; `woodbury_native` is its twin in plain torch."""

from __future__ import annotations

from torch import Tensor

from fastsfvae.ops import _library
from fastsfvae.ops.woodbury_native import Woodbury


def woodbury_triton(
    gram: Tensor, projection: Tensor, rr: Tensor, latent_var: Tensor, noise_var: Tensor
) -> Woodbury:
    """Factorise C = cI + S G S in one launch; no graph of its own.

    Args:
        gram: G, float32 ``[B, m, m]`` with m <= 64.
        projection: p, float32 ``[B, m]``.
        rr: r^T r, float32 ``[B]``.
        latent_var: h >= 0, float32 ``[B, m]``.
        noise_var: c > 0, float32 ``[B]``.

    Raises:
        RuntimeError: a device that Triton cannot reach.
        TypeError: an input that is not float32.
        ValueError: float64, or m above 64.
    """
    _library.require_triton(gram)
    return Woodbury(*_library.woodbury(gram, projection, rr, latent_var, noise_var))
