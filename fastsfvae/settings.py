"""The objective's settings, as they are passed on together, and their check."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae._checks import Likelihood


class Settings(NamedTuple):
    """The keyword arguments of `sampling_free_elbo`."""

    noise_var: float | Tensor
    gamma: float | Tensor
    kl_weight: float | Tensor
    likelihood: Likelihood
    backend: str
    chunk_size: int | None


def check_settings(
    noise_var: float | Tensor,
    gamma: float | Tensor,
    kl_weight: float | Tensor,
    likelihood: str,
) -> None:
    """Raise one clear error for a setting out of range."""
    _checks.noise_var(noise_var)
    _checks.gamma(gamma)
    _checks.kl_weight(kl_weight)
    _checks.choice("likelihood", likelihood, _checks.LIKELIHOODS)


def warn_of_weak(likelihood: str, gamma: float | Tensor) -> None:
    """Warn the caller's caller of a gamma with which the objective is pointless."""
    # A compiler may hold the number as a symbol.
    if isinstance(gamma, Tensor) or torch.compiler.is_compiling():
        return
    if likelihood in ("mixture", "normalized") and gamma < 0.5:
        warnings.warn(
            f'likelihood="{likelihood}" with gamma={gamma!r} hardly penalises the decoder\'s noise '
            'and trains an auto-encoder: use gamma >= 0.5, or likelihood="precision"',
            stacklevel=3,
        )
