"""What a decoder's latents do to its images, direction by direction.

Trains a small decoder of the digits (a few seconds), finds the largest and smallest singular
directions of its Jacobian at some digits' latents, and prints how far a step along each moves the
image. With --out DIR it draws the images along the first, the middle and the last direction.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import fastsfvae as sf
from fastsfvae.data import digits

M, STEPS = 8, 400


def train() -> tuple[nn.Module, nn.Module, Tensor]:
    """An encoder, a decoder and test images."""
    torch.manual_seed(0)
    images, test = (digits(split).images.flatten(1) / 255 for split in ("train", "test"))
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
    return encoder, decoder, test


def draw(decoder: nn.Module, z: Tensor, right: Tensor, path: Path) -> None:
    """Images along three directions, both ways from z [1, m]; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, rows = torch.linspace(-3, 3, 7), (0, M // 2 - 1, M - 1)
    figure, axes = pyplot.subplots(len(rows), len(steps), figsize=(7, 3.3))
    for row, line in zip(rows, axes, strict=True):
        with torch.no_grad():
            shown = decoder(z + steps[:, None] * right[0, row]).view(-1, 28, 28)
        for step, image, axis in zip(steps, shown, line, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([]), axis.set_yticks([])
            if row == rows[0]:
                axis.set_title(f"{float(step):+.0f}", fontsize=9)
        line[0].set_ylabel(f"direction {row + 1}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"images along the directions: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for a picture")
    out = parser.parse_args().out
    encoder, decoder, test = train()
    with torch.no_grad():
        z = encoder(test[:200]).chunk(2, dim=1)[0]
    found = sf.singular_directions(decoder, z, M)
    print("singular values of J, mean over 200 digits:")
    print("  " + " ".join(f"{float(value):.2f}" for value in found.values.mean(0)))

    # J along each right vector is its value times the left one.
    with torch.no_grad():
        _, pushed = sf.jvp(decoder, z, found.right.transpose(0, 1))
        moved = pushed.norm(dim=2).T
        print(f"|J v| is that value, to {float((moved / found.values - 1).abs().max()):.0e}")
        # A step of 1 along v: what the linearisation leaves out.
        step = decoder(z + found.right[:, 0]) - decoder(z)
    left_out = (step - pushed[0]).norm(dim=1) / step.norm(dim=1)
    print(f"a step of 1 along the first direction: {float(left_out.mean()):.0%} is not linear")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        draw(decoder, z[:1], found.right[:1], out / "singular_directions.png")


if __name__ == "__main__":
    main()
