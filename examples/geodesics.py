"""Where a decoder stretches its latent plane, and the shortest ways through it.

    python examples/geodesics.py --out pictures

Trains a small VAE with two latents on the bundled digits (seconds), draws the magnification
1/2 log det G over the latent plane and, between the mean latents of some digits, straight lines and
geodesics: curves whose images are shortest. Prints the lengths in the space of images and writes
geodesics.png. Needs matplotlib: pip install 'fastsfvae[train]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import fastsfvae as sf
from fastsfvae.data import digits

PAIRS = ((0, 1), (1, 6), (0, 7))
STEPS, BATCH = 500, 64
# Pieces of a curve while it is made shorter, and of each of them where it is measured.
PIECES, FINER = 24, 8


def train(images: Tensor) -> tuple[nn.Module, nn.Module]:
    """An encoder to (mean, log_var) and a decoder of smooth layers, which have curvature."""
    encoder = nn.Sequential(nn.Linear(784, 256), nn.SiLU(), nn.Linear(256, 4))
    layers = nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, 784)
    decoder = nn.Sequential(*layers, nn.Sigmoid())
    loss_fn = sf.SamplingFreeLoss(decoder, noise_var=0.05)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
    for _ in range(STEPS):
        x = images[torch.randint(len(images), (BATCH,))]
        mean, log_var = encoder(x).chunk(2, dim=1)
        loss = loss_fn(x, mean, log_var)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder, decoder.requires_grad_(False)


def lines(ends: Tensor, pieces: int) -> Tensor:
    """Straight curves [N, pieces + 1, 2] between the ends [N, 2, 2]."""
    t = torch.linspace(0, 1, pieces + 1)[:, None]
    return ends[:, :1] * (1 - t) + ends[:, 1:] * t


def energy(metric, curves: Tensor) -> Tensor:
    """The sum of dz^T G dz over the pieces, G at their middles; least where a curve is geodesic."""
    steps, middles = curves.diff(dim=1), (curves[:, 1:] + curves[:, :-1]) / 2
    G = metric(middles.flatten(0, 1)).view(*steps.shape, 2)
    return torch.einsum("npi,npij,npj->", steps, G, steps)


def geodesics(metric, ends: Tensor) -> Tensor:
    """Curves of least energy between the ends, from straight lines on."""
    start = lines(ends, PIECES)
    inner = start[:, 1:-1].clone().requires_grad_()
    optimizer = torch.optim.LBFGS([inner], max_iter=150, line_search_fn="strong_wolfe")

    def curves() -> Tensor:
        return torch.cat([start[:, :1], inner, start[:, -1:]], 1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = energy(metric, curves())
        value.backward()
        return value

    optimizer.step(closure)
    return curves().detach()


def lengths(decoder: nn.Module, curves: Tensor) -> Tensor:
    """The lengths of the curves' images, [N], by fine chords."""
    pieces = torch.stack([curves[:, :-1], curves[:, 1:]], 2).flatten(0, 1)
    fine = lines(pieces, FINER)
    images = decoder(fine.flatten(0, 1)).unflatten(0, fine.shape[:2])
    return images.diff(dim=1).norm(dim=-1).sum(1).view(len(curves), -1).sum(1)


def draw(metric, means: Tensor, centres: Tensor, straight: Tensor, shortest: Tensor, path: Path):
    """The map of 1/2 log det G with the curves, as a PNG file."""
    from matplotlib import patheffects
    from matplotlib.figure import Figure

    low, high = means.quantile(0.01, dim=0) - 0.3, means.quantile(0.99, dim=0) + 0.3
    axis = [torch.linspace(float(a), float(b), 120) for a, b in zip(low, high, strict=True)]
    grid = torch.cartesian_prod(*axis)
    magnification = 0.5 * torch.linalg.slogdet(metric(grid)).logabsdet.view(120, 120)

    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.subplots()
    shown = axes.pcolormesh(*axis, magnification.T, cmap="cividis", shading="gouraud")
    figure.colorbar(shown, label=r"magnification, $\frac{1}{2}\,\log\,\det\,G$")
    for curves, style, name in ((straight, "--", "straight line"), (shortest, "-", "geodesic")):
        for i, curve in enumerate(curves):
            label = None if i else name
            axes.plot(*curve.T, style, color="white", linewidth=1.8, label=label)
    outline = [patheffects.withStroke(linewidth=3, foreground="black")]
    for digit, centre in enumerate(centres):
        axes.text(
            *centre.tolist(), str(digit), ha="center", va="center", size=12, weight="bold",
            color="white", path_effects=outline, clip_on=True,
        )  # fmt: skip
    axes.set(xlabel="$z_1$", ylabel="$z_2$", title="Latent plane of the digits")
    axes.set(xlim=axis[0][[0, -1]].tolist(), ylim=axis[1][[0, -1]].tolist())
    axes.legend(loc="lower left", facecolor="black", labelcolor="white", framealpha=0.6)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train, measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="the folder of geodesics.png")
    out = parser.parse_args().out
    torch.manual_seed(0)
    images, labels = digits("train")
    x = images.flatten(1).float() / 255
    encoder, decoder = train(x)
    with torch.no_grad():
        means = encoder(x)[:, :2]
    centres = torch.stack([means[labels == digit].mean(0) for digit in range(10)])

    metric = sf.metric(decoder)
    ends = torch.stack([centres[list(pair)] for pair in PAIRS])
    straight, shortest = lines(ends, PIECES), geodesics(metric, ends)
    print("lengths in the space of images")
    print("digits  straight  geodesic  ratio")
    both = lengths(decoder, straight).tolist(), lengths(decoder, shortest).tolist()
    for (a, b), line, geodesic in zip(PAIRS, *both, strict=True):
        print(f"{a} to {b}  {line:8.3f}  {geodesic:8.3f}  {geodesic / line:5.3f}")
    out.mkdir(parents=True, exist_ok=True)
    draw(metric, means, centres, straight, shortest, out / "geodesics.png")
    print(f"wrote {out / 'geodesics.png'}")


if __name__ == "__main__":
    main()
