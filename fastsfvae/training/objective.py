"""From a configuration to its objective."""

from __future__ import annotations

from torch import Tensor, nn

from fastsfvae.objectives.auto_encoder import AutoEncoder
from fastsfvae.objectives.dreg import DoublyReparameterized
from fastsfvae.objectives.iwae import ImportanceWeighted
from fastsfvae.objectives.sampling import Sampling
from fastsfvae.objectives.sampling_free import SamplingFree
from fastsfvae.objectives.stl import StickingTheLanding
from fastsfvae.objectives.terms import Objective
from fastsfvae.objectives.vlae import VariationalLaplace
from fastsfvae.training.config import TrainConfig


def make_objective(config: TrainConfig, decoder: nn.Module, **scheduled: Tensor) -> Objective:
    """Build the objective that a configuration names.

    Args:
        config: names it and its settings.
        decoder: f, ``z [B, m] -> [B, *out]``.
        **scheduled: 0-d tensors for the settings that change while training, gamma and kl_weight.
    """
    c, samples = config.noise_var, config.samples
    weights = {"gamma": config.gamma, "kl_weight": config.kl_weight} | scheduled
    match config.method:
        case "sampling" | "beta-vae":
            beta = weights["kl_weight"]
            return Sampling(decoder, noise_var=c, kl_weight=beta, samples=samples)
        case "auto-encoder":
            return AutoEncoder(decoder, noise_var=c)
        case "iwae":
            return ImportanceWeighted(decoder, noise_var=c, samples=samples)
        case "stl":
            return StickingTheLanding(decoder, noise_var=c, samples=samples)
        case "dreg":
            return DoublyReparameterized(decoder, noise_var=c, samples=samples)
        case "vlae":
            return VariationalLaplace(
                decoder,
                noise_var=c,
                mode_steps=config.mode_steps,
                bound=config.bound,
                samples=samples,
                backend=config.backend,
            )
    settings = {"likelihood": config.likelihood, "backend": config.backend}
    return SamplingFree(decoder, noise_var=c, **weights, **settings)
