"""Where a decoder stretches its latents: two autoencoders of the bundled digits, m = 2.

Both are trained alike, the second with `isometry_loss` besides, which pulls every J^T J towards one
multiple of the identity. Printed for either: the reconstruction error, the isometry measure (1/m is
the least), and how the log-volume 1/2 log det J^T J lies over the test digits, by label: a low one
means that the decoder has squeezed the digit's neighbourhood, a high one that few latents have to
draw many pictures.

    python examples/log_volume.py --out runs/log_volume

also writes z and the log-volume of each test digit to log_volume.csv. It needs the library alone.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from torch import Tensor, nn

import fastsfvae as sf
from fastsfvae.data import digits

STEPS, BATCH, LATENTS = 300, 128, 2
# Of the isometry measure beside the squared error of a picture.
WEIGHT = 4.0


def train(images: Tensor, weight: float) -> tuple[nn.Module, nn.Module]:
    """An autoencoder whose smooth decoder is held to an isometry by that weight."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(784, 128), nn.SiLU(), nn.Linear(128, LATENTS))
    decoder = nn.Sequential(nn.Linear(LATENTS, 64), nn.SiLU(), nn.Linear(64, 128), nn.SiLU())
    decoder.append(nn.Linear(128, 784))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
    for _ in range(STEPS):
        x = images[torch.randint(len(images), (BATCH,))]
        z = encoder(x)
        error = (decoder(z) - x).square().sum(1).mean()
        loss = error + weight * sf.isometry_loss(decoder, z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.requires_grad_(False), decoder.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Where a decoder stretches its latents.")
    parser.add_argument("--out", type=Path, help="folder for log_volume.csv")
    out = parser.parse_args().out
    images, x = (digits(split).images.flatten(1) / 255 for split in ("train", "test"))
    labels = digits("test").labels
    rows: list[list[float]] = []
    for weight in (0.0, WEIGHT):
        encoder, decoder = train(images, weight)
        z = encoder(x)
        error = (decoder(z) - x).square().sum(1).mean()
        volume, lost = sf.log_volume(decoder, z, return_lost=True)
        print(f"\nisometry_loss times {weight:g}")
        print(f"  squared error of a picture  {error:.1f}")
        measure = sf.isometry_loss(decoder, z)
        print(f"  isometry measure            {measure:.3f}, at least {1 / LATENTS:g}")
        spread = f"{volume.mean():.2f} +- {volume.std():.2f} nats, {int(lost.sum())} lost"
        print(f"  log-volume                  {spread}")
        means = sorted((float(volume[labels == digit].mean()), digit) for digit in range(10))
        by_digit = ", ".join(f"{digit}: {mean:.2f}" for mean, digit in means)
        print(f"  by digit, rising            {by_digit}")
        rows += torch.stack([torch.full_like(volume, weight), labels, *z.T, volume], 1).tolist()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "log_volume.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["weight", "label", "z1", "z2", "log_volume"], *rows])
        print(f"\nwrote {out / 'log_volume.csv'}")


if __name__ == "__main__":
    main()
