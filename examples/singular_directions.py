"""What a decoder's latents do to its images, direction by direction.

Trains a small decoder of the digits (a few seconds), finds the largest and smallest singular
directions of its Jacobian at some digits' latents, and prints how far a step along each moves the
image.

    python examples/singular_directions.py --out pictures

also draws the images along the first, the middle and the last direction, and needs matplotlib:
pip install 'fastsfvae[train]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import fastsfvae as sf
from fastsfvae.data import digits

M, STEPS = 8, 400


def draw(decoder: nn.Module, z: Tensor, right: Tensor, path: Path) -> None:
    """Images along three directions, both ways from z [m], as one picture."""
    from matplotlib.figure import Figure

    steps, rows = torch.linspace(-3, 3, 7), (0, M // 2 - 1, M - 1)
    figure = Figure(figsize=(7, 3.3), layout="constrained")
    axes = figure.subplots(len(rows), 1)
    for row, axis in zip(rows, axes, strict=True):
        images = decoder(z + steps[:, None] * right[row]).view(-1, 28, 28)
        axis.imshow(images.permute(1, 0, 2).flatten(1), cmap="gray", vmin=0, vmax=1)
        axis.set(yticks=[], ylabel=f"direction {row + 1}", xticks=[])
    axes[-1].set(xticks=range(14, 7 * 28, 28), xticklabels=[f"{step:+.0f}" for step in steps])
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a decoder's latents do to its images.")
    parser.add_argument("--out", type=Path, help="folder for a picture")
    out = parser.parse_args().out
    torch.manual_seed(0)
    images = digits("train").images.flatten(1) / 255
    encoder = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 2 * M))
    decoder = nn.Sequential(nn.Linear(M, 128), nn.SiLU(), nn.Linear(128, 784))
    loss_fn = sf.SamplingFreeLoss(decoder)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
    for _ in range(STEPS):
        x = images[torch.randint(len(images), (64,))]
        loss = loss_fn(x, *encoder(x).chunk(2, dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    nn.ModuleList([encoder, decoder]).requires_grad_(False)

    z = encoder(digits("test").images[:200].flatten(1) / 255)[:, :M]
    found = sf.singular_directions(decoder, z, M)
    print("singular values of J, mean over 200 digits:")
    print("  " + " ".join(f"{float(value):.2f}" for value in found.values.mean(0)))

    # J along each right vector is its value times the left one.
    _, pushed = sf.jvp(decoder, z, found.right.transpose(0, 1))
    moved = pushed.square().sum(2).sqrt().T
    print(f"|J v| is that value, to {float((moved / found.values - 1).abs().max()):.0e}")
    # A step of 1 along v: what the linearisation leaves out.
    step = decoder(z + found.right[:, 0]) - decoder(z)
    left_out = ((step - pushed[0]).square().sum(1) / step.square().sum(1)).sqrt().mean()
    print(f"a step of 1 along the first direction: {float(left_out):.0%} is not linear")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        draw(decoder, z[0], found.right[0], out / "singular_directions.png")
        print(f"images along the directions: {out / 'singular_directions.png'}")


if __name__ == "__main__":
    main()
