"""Where a decoder stretches its latent plane, and the shortest ways through it.

    python examples/geodesics.py --out pictures

Trains a small VAE with two latents on the bundled digits (seconds). Prints how long the images of
straight lines and of geodesics between digits' mean latents are, and draws both over a map of the
magnification, 1/2 log det G, as geodesics.png. Needs matplotlib: pip install 'fastsfvae[train]'.
"""

import argparse
from pathlib import Path

import torch
from matplotlib import pyplot
from torch import Tensor, nn

import fastsfvae as sf
from fastsfvae.data import digits

PAIRS = (0, 1), (1, 6), (0, 7)
parser = argparse.ArgumentParser(description="Geodesics in a latent plane of the digits.")
parser.add_argument("--out", type=Path, default=Path(), help="the folder of geodesics.png")
out = parser.parse_args().out

torch.manual_seed(0)
images, labels = digits("train").images.flatten(1) / 255, digits("train").labels
encoder = nn.Sequential(nn.Linear(784, 256), nn.SiLU(), nn.Linear(256, 4))
layers = nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, 784)
decoder = nn.Sequential(*layers, nn.Sigmoid())
loss_fn = sf.SamplingFreeLoss(decoder, noise_var=0.05)
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
for _ in range(500):
    x = images[torch.randint(len(images), (64,))]
    loss = loss_fn(x, *encoder(x).chunk(2, dim=1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
decoder.requires_grad_(False)

# Straight curves [N, 25, 2] between mean latents; a geodesic is a curve of least energy.
z = encoder(images).detach()[:, :2]
centres = torch.stack([z[labels == digit].mean(0) for digit in range(10)])
ends, t = centres[torch.tensor(PAIRS)], torch.linspace(0, 1, 25)[:, None]
straight = ends[:, :1] * (1 - t) + ends[:, 1:] * t
shortest, metric = straight.clone().requires_grad_(), sf.metric(decoder)
search = torch.optim.LBFGS([shortest], max_iter=150, line_search_fn="strong_wolfe")


def energy() -> Tensor:
    """The sum of dz^T G dz over the pieces, G at their middles, and its gradient inside."""
    steps, middles = shortest.diff(dim=1), (shortest[:, 1:] + shortest[:, :-1]) / 2
    G = metric(middles.flatten(0, 1)).view(*steps.shape, 2)
    value = torch.einsum("npi,npij,npj->", steps, G, steps)
    (gradient,) = torch.autograd.grad(value, [shortest])
    shortest.grad = nn.functional.pad(gradient[:, 1:-1], (0, 0, 1, 1))  # the ends stay
    return value


search.step(energy)
# The lengths of the curves' images, by chords of an eighth of a piece.
curves = torch.cat([straight, shortest.detach()])
fine: Tensor = nn.functional.interpolate(curves.mT, 193, mode="linear", align_corners=True).mT
lengths = torch.stack([path.diff(dim=0).square().sum(1).sqrt().sum() for path in decoder(fine)])
print("lengths in the space of images\ndigits  straight  geodesic  ratio")
for (a, b), line, geodesic in zip(PAIRS, *lengths.view(2, -1), strict=True):
    print(f"{a} to {b}  {line:8.3f}  {geodesic:8.3f}  {geodesic / line:5.3f}")

low, high = z.quantile(0.01, dim=0) - 0.3, z.quantile(0.99, dim=0) + 0.3
z1, z2 = torch.lerp(low, high, torch.linspace(0, 1, 120)[:, None]).T
magnification = torch.logdet(metric(torch.cartesian_prod(z1, z2))).view(120, 120) / 2
figure, axes = pyplot.subplots(figsize=(6.4, 5.2), layout="constrained")
shown = axes.pcolormesh(z1, z2, magnification.T, cmap="cividis", shading="gouraud")
figure.colorbar(shown, label=r"magnification, $\frac{1}{2}\,\log\,\det\,G$")
axes.set(xlabel="$z_1$", ylabel="$z_2$", title="Straight lines (dashed) and geodesics")
axes.plot(*straight.permute(2, 1, 0), "w--", *shortest.detach().permute(2, 1, 0), "w-")
for digit, (a, b) in enumerate(centres):
    axes.text(float(a), float(b), str(digit), color="white", backgroundcolor="black", clip_on=True)
out.mkdir(parents=True, exist_ok=True)
figure.savefig(out / "geodesics.png", dpi=130)
print(f"wrote {out / 'geodesics.png'}")
