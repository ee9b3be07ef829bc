"""The networks of a run: the model's, and what its method makes of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fastsfvae.models import ModelConfig, build
from fastsfvae.objectives.delta_vae import MinimumRate
from fastsfvae.objectives.householder import Householder
from fastsfvae.objectives.rae import spectrally_normalized
from fastsfvae.training.config import TrainConfig


def build_networks(
    config: TrainConfig, own: Callable[[ModelConfig], object] | None = None
) -> tuple[nn.Module, nn.Module]:
    """Build (encoder, decoder) on the CPU, drawing from torch's global generator.

    Args:
        config: of the run.
        own: as in `fastsfvae.models.build`.

    Raises:
        ValueError: as `fastsfvae.models.build`, or for a decoder that the method cannot take.
    """
    encoder, decoder = build(config.model_config, own)
    if not changes_networks(config):
        return encoder, decoder
    if config.method == "householder":
        encoder = Householder(encoder, config.latent_dim, config.flows)
    elif config.method == "delta-vae":
        encoder = MinimumRate(encoder, config.min_rate)
    else:
        spectrally_normalized(decoder)
    return encoder, decoder


def changes_networks(config: TrainConfig) -> bool:
    """Whether the method makes something else of the model's networks."""
    normalised = config.method == "rae" and config.regularizer == "spectral-norm"
    return normalised or config.method in ("householder", "delta-vae")
