"""What a trained run's images are drawn from, and what it cannot be judged by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsfvae.data.pixels import to_unit
from fastsfvae.evaluate import fit_mixture
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.methods import DETERMINISTIC, WITHOUT_PRIOR

_COMPONENTS = 10
_MOST_IMAGES = 10_000
_BATCH = 250


class Latents(NamedTuple):
    """Latents to decode.

    Attributes:
        z: ``[count, m]``.
        origin: what they were drawn from, in words that follow "z ~".
    """

    z: Tensor
    origin: str


@torch.no_grad()
def encode(encoder: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode images ``[N, C, H, W]`` in chunks; mean and log_var, each ``[N, m]``.

    log_var may be the covariance's factor, ``[N, m, m]``, as the encoder's is.
    """
    parts = [encoder(chunk) for chunk in x.split(_BATCH)]
    mean, log_var = zip(*parts, strict=True)
    return torch.cat(mean), torch.cat(log_var)


def sample_latents(
    config: TrainConfig, encoder: nn.Module, count: int, generator: torch.Generator
) -> Latents:
    """Draw latents as a run's method means them to be drawn: from its prior, or what stands for it.

    Args:
        config: of the run.
        encoder: x -> (mean, log_var).
        count: how many.
        generator: source of the noise, on the encoder's device.

    Raises:
        RuntimeError: for a method without a prior where scikit-learn is missing.
    """
    device = generator.device
    if config.method not in WITHOUT_PRIOR:
        z = torch.randn(count, config.latent_dim, generator=generator, device=device)
        return Latents(z, "N(0, I)")
    images = config.load_images("train")[:_MOST_IMAGES]
    latents, _ = encode(encoder, to_unit(images.to(device)))
    mixture = fit_mixture(latents, min(_COMPONENTS, len(latents)), config.seed)
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    z = mixture.sample(count, torch.Generator().manual_seed(seed)).to(latents)
    count = len(mixture.weight)
    return Latents(z, f"{count} Gaussians fitted to the training latents")


def posterior_noise(config: TrainConfig, generator: torch.Generator) -> torch.Generator | None:
    """The generator, for a method whose posterior can be drawn from; None for the others."""
    return None if config.method in DETERMINISTIC else generator


def without_density(config: TrainConfig) -> str:
    """Why a run has no log-density of images and no posterior; "" where it has both."""
    if config.method not in DETERMINISTIC:
        return ""
    return (
        f"method {config.method} decodes the mean alone: no density of x, no variance of q(z|x), "
        "so no log ML, ELBO, KL, collapse or sampled error"
    )
