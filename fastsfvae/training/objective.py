"""From a configuration to its objectives."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastsfvae._checks import Likelihood
from fastsfvae.objectives.auto_encoder import AutoEncoder
from fastsfvae.objectives.dreg import DoublyReparameterized
from fastsfvae.objectives.exact import ExactMarginal
from fastsfvae.objectives.iwae import ImportanceWeighted
from fastsfvae.objectives.noise_variance import NoiseVar
from fastsfvae.objectives.sampling import Sampling
from fastsfvae.objectives.sampling_free import SamplingFree
from fastsfvae.objectives.stl import StickingTheLanding
from fastsfvae.objectives.terms import Objective
from fastsfvae.objectives.vlae import VariationalLaplace
from fastsfvae.training.config import TrainConfig


def make_objective(
    config: TrainConfig, decoder: nn.Module, noise_var: NoiseVar | None = None, **scheduled: Tensor
) -> Objective:
    """Build the objective of a configuration's method.

    Args:
        config: names it and its settings.
        decoder: f, ``z [B, m] -> [B, *out]``.
        noise_var: c where it is a module to be learned; None is the configuration's.
        **scheduled: 0-d tensors for the settings that change while training, gamma and kl_weight.
    """
    noise_var = config.noise_var if noise_var is None else noise_var
    drawn: dict[str, Any] = {"samples": config.samples, "draws": config.draws}
    match config.method:
        case "sampling" | "beta-vae":
            beta = scheduled.get("kl_weight", config.kl_weight)
            return Sampling(decoder, noise_var=noise_var, kl_weight=beta, **drawn)
        case "auto-encoder":
            return AutoEncoder(decoder, noise_var=noise_var)
        case "iwae":
            proposal: dict[str, Any] = {"proposal": config.proposal, "backend": config.backend}
            return ImportanceWeighted(decoder, noise_var=noise_var, **proposal, **drawn)
        case "stl":
            return StickingTheLanding(decoder, noise_var=noise_var, **drawn)
        case "dreg":
            return DoublyReparameterized(decoder, noise_var=noise_var, **drawn)
        case "vlae":
            return VariationalLaplace(
                decoder,
                noise_var=config.noise_var,
                mode_steps=config.mode_steps,
                bound=config.bound,
                backend=config.backend,
                **drawn,
            )
        case "exact-marginal":
            return ExactMarginal(decoder, noise_var=config.noise_var)
    return _sampling_free(config, config.likelihood, decoder, noise_var, scheduled)


def make_start(
    config: TrainConfig, decoder: nn.Module, noise_var: NoiseVar | None = None, **scheduled: Tensor
) -> Objective:
    """Build the objective of a configuration's warm start; the arguments are `make_objective`'s.

    Its noise variance, gamma and weight of the KL divergence are the run's.
    """
    return _sampling_free(config, config.start.likelihood, decoder, noise_var, scheduled)


def _sampling_free(
    config: TrainConfig,
    likelihood: Likelihood,
    decoder: nn.Module,
    noise_var: NoiseVar | None,
    scheduled: dict[str, Tensor],
) -> SamplingFree:
    weights = {"gamma": config.gamma, "kl_weight": config.kl_weight} | scheduled
    settings = {"likelihood": likelihood, "backend": config.backend}
    noise_var = config.noise_var if noise_var is None else noise_var
    return SamplingFree(decoder, noise_var=noise_var, **weights, **settings)
