"""Tracking latents that are seen through a decoder, with noise, by the extended Kalman filter.

Trains a small decoder of the digits (a few seconds), lets latents wander from one digit towards
others, and shows their images under strong noise. The filter knows the noise and how far the
latents wander at a step; beside it, each frame by itself, from the prior. Prints the errors of
both, and whether the truth lies as far from the mean as the covariance says.

    python examples/kalman_filter.py

needs the library alone.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import fastsfvae as sf
from fastsfvae.data import digits

M, STEPS, FRAMES, TRACKS = 8, 400, 30, 32
DRIFT, NOISE_VAR = 0.02, 2.0


def train() -> nn.Module:
    """A decoder of the digits."""
    torch.manual_seed(0)
    images = digits("train").images.flatten(1) / 255
    encoder = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 2 * M))
    decoder = nn.Sequential(nn.Linear(M, 128), nn.SiLU(), nn.Linear(128, 784))
    loss_fn = sf.SamplingFreeLoss(decoder, likelihood="expected")
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
    for _ in range(STEPS):
        x = images[torch.randint(len(images), (64,))]
        loss = loss_fn(x, *encoder(x).chunk(2, dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return decoder.requires_grad_(False)


def track(decoder: nn.Module, frames: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Means and covariances after each of the frames [T, B, 784]."""
    mean, cov = torch.zeros(TRACKS, M), torch.eye(M).repeat(TRACKS, 1, 1)
    means: list[Tensor] = []
    covs: list[Tensor] = []
    for x in frames:
        mean, cov, _ = sf.kalman_update(decoder, x, mean, cov, NOISE_VAR)
        means.append(mean)
        covs.append(cov)
        cov = cov + DRIFT * torch.eye(M)
    return means, covs


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    decoder = train()
    start, drift = torch.randn(1, TRACKS, M), torch.randn(FRAMES - 1, TRACKS, M)
    z = torch.cat([start, DRIFT**0.5 * drift]).cumsum(0)
    clean = decoder(z.flatten(0, 1)).unflatten(0, (FRAMES, TRACKS))
    frames = clean + NOISE_VAR**0.5 * torch.randn_like(clean)

    means, covs = track(decoder, frames)
    prior = torch.zeros(TRACKS, M), torch.ones(TRACKS, M)
    alone = [sf.kalman_update(decoder, x, *prior, NOISE_VAR).mean for x in frames]
    print("mean squared error of the latents, by frame:")
    print("frame   filter   each frame alone   variance that the filter claims")
    for t in (0, 1, 3, 7, 15, FRAMES - 1):
        errors = [(found[t] - z[t]).square().mean() for found in (means, alone)]
        claimed = covs[t].diagonal(dim1=1, dim2=2).mean()
        print(f"{t:5d} {errors[0]:8.3f} {errors[1]:18.3f} {claimed:33.3f}")


if __name__ == "__main__":
    main()
