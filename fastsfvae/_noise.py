"""Standard normal noise: independent rows, antithetic pairs, or orthogonal antithetic pairs.

Each row alone is N(0, I) whatever its kind, so that a mean over rows stays unbiased. Of a pair
(e, -e) all odd powers cancel; orthogonal rows share out the directions besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fastsfvae import _checks

Draws: TypeAlias = Literal["iid", "antithetic", "orthogonal"]
DRAWS: tuple[Draws, ...] = get_args(Draws)


def check_draws(draws: Draws, samples: int, latent_dim: int | None = None) -> None:
    """Refuse a kind that does not exist, or a number of samples that it cannot have.

    Raises:
        ValueError: in one line.
    """
    _checks.choice("draws", draws, DRAWS)
    if draws == "iid":
        return
    if samples % 2:
        raise ValueError(
            f"draws={draws!r} with samples={samples}: they come in pairs, give an even number"
        )
    if draws == "orthogonal" and latent_dim is not None and samples > 2 * latent_dim:
        raise ValueError(
            f"draws='orthogonal' with samples={samples}: {latent_dim} latent dimensions have no "
            f"more than {latent_dim} orthogonal directions, give at most {2 * latent_dim}"
        )


def noise_like(mean: Tensor, generator: torch.Generator | None) -> dict[str, Any]:
    """What noise for posteriors like this mean is drawn with: its device, float32 at least."""
    dtype = torch.promote_types(mean.dtype, torch.float32)
    return {"device": mean.device, "dtype": dtype, "generator": generator}


def standard_normal(
    shape: Sequence[int],
    draws: Draws,
    *,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw noise ``[K, ..., m]``, each row N(0, I); rows of other middle indices are independent.

    "antithetic": the second half of K is minus the first. "orthogonal": so it is, and the K/2 rows
    of the first are rho_k q_k with q_k the first columns of a Haar-distributed orthogonal matrix
    and rho_k independent, of chi_m distribution.

    Args:
        shape: ``(K, ..., m)``.
        draws: the kind.
        device: the noise's, and `generator`'s.
        dtype: float32 or float64.
        generator: source of the noise; None is torch's global one.

    Raises:
        ValueError: as `check_draws`.
    """
    check_draws(draws, shape[0], shape[-1])
    count = shape[0] if draws == "iid" else shape[0] // 2
    noise = torch.randn((count, *shape[1:]), generator=generator, device=device, dtype=dtype)
    if draws == "iid":
        return noise
    if draws == "orthogonal":
        noise = _orthogonalise(noise)
    return torch.cat([noise, -noise])


def _orthogonalise(noise: Tensor) -> Tensor:
    """Turn Gaussian rows ``[k, ..., m]`` into orthogonal ones of the same lengths.

    Of a Gaussian matrix A = QR, with a positive diagonal of R, Q is Haar-distributed and
    independent of R, and so of the lengths of A's columns.
    """
    columns = noise.movedim(0, -1)
    q, r = torch.linalg.qr(columns)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(noise.dtype)
    scale = signs * torch.linalg.vector_norm(columns, dim=-2)
    return (q * scale.unsqueeze(-2)).movedim(-1, 0)
