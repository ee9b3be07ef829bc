"""Fill in what is hidden of a digit: find the latents that explain the pixels that are seen.

    python examples/fit_latents.py --out pictures

Trains a small decoder of the digits for a few seconds. Then it hides the lower half of test digits,
fits latents to the upper half, and compares the hidden pixels with what the encoder's means, which
see the hidden pixels as black, make of them. --out writes a picture as well, and needs matplotlib:
pip install 'fastsfvae[train]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import fastsfvae as sf
from fastsfvae.data import digits

M, NOISE_VAR, SHOWN = 16, 0.05, 10


def train(images: torch.Tensor, steps: int) -> tuple[nn.Module, nn.Module]:
    """An encoder and a decoder, by the sampling-free loss."""
    encoder = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 2 * M))
    decoder = nn.Sequential(nn.Linear(M, 128), nn.SiLU(), nn.Linear(128, 784))
    loss_fn = sf.SamplingFreeLoss(decoder, noise_var=NOISE_VAR)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
    for _ in range(steps):
        x = images[torch.randint(len(images), (64,))]
        loss = loss_fn(x, *encoder(x).chunk(2, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder, decoder


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill in what is hidden of a digit.")
    parser.add_argument("--out", type=Path, help="a folder for the picture")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    options = parser.parse_args()
    torch.manual_seed(0)
    encoder, decoder = train(digits("train").images.flatten(1) / 255, options.steps)
    x = digits("test").images.flatten(1)[:100] / 255
    seen = torch.zeros_like(x)
    seen[:, : 784 // 2] = 1
    with torch.no_grad():
        guess = encoder(x * seen).chunk(2, 1)[0]
    fit = sf.fit_latents(decoder, x, guess, weight=seen, prior_var=1.0, noise_var=NOISE_VAR)
    with torch.no_grad():
        by_encoder, by_fit = decoder(guess), decoder(fit.z)
    parts = seen, 1 - seen
    for name, output in {"the encoder's means": by_encoder, "fitted latents": by_fit}.items():
        errors = [((x - output).square() * part).sum(1).mean() for part in parts]
        print(f"{name:20} squared error, seen half {errors[0]:6.2f}, hidden half {errors[1]:6.2f}")
    steps, share = fit.steps.float().mean(), float(fit.converged.float().mean())
    print(f"{len(x)} fits, {steps:.1f} steps each on average, {share:.0%} converged")

    # What the data leave open: the spread of the hidden pixels, by the decoder linearised at z.
    _, J = sf.decode_with_jacobian(decoder, fit.z)
    with torch.no_grad():
        variance = torch.einsum("bin,bij,bjn->bn", J, fit.covariance, J)
    spread = [((variance * part).sum(1) / part.sum(1)).mean().sqrt() for part in parts]
    print(f"standard deviation of a pixel: seen {spread[0]:.3f}, hidden {spread[1]:.3f}")

    if options.out:
        from matplotlib import image

        rows = torch.stack([row[:SHOWN] for row in (x, x * seen, by_encoder, by_fit)])
        picture = rows.view(-1, SHOWN, 28, 28).transpose(1, 2).reshape(-1, SHOWN * 28).clamp(0, 1)
        options.out.mkdir(parents=True, exist_ok=True)
        image.imsave(options.out / "fit_latents.png", picture.numpy(), cmap="gray_r")
        print(f"wrote {options.out / 'fit_latents.png'}: digits, what is seen, encoder, fit")


if __name__ == "__main__":
    main()
