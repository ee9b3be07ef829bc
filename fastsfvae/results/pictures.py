"""Pictures of images and of any decoder, of no run in particular. Needs matplotlib.

Images are ``[N, C, H, W]`` in [0, 1], C = 1 or 3; what lies outside is clamped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsfvae.objectives.draws import draw

Decoder = Callable[[Tensor], Tensor]

# Rows of a block of traversals: more dimensions go beside it.
_TRAVERSAL_ROWS = 25
# The grey of the rules between images: seen beside black ones and beside white ones.
_RULE_GREY = 0.7
# Up to so many points, a curve shows each.
_FEW_POINTS = 20


def new_figure(width: float, height: float):
    """An empty figure of so many inches."""
    # The object-oriented interface needs no display and leaves no global state behind.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def marker(points: int) -> str:
    """The marker of a curve through so many points: none where they are many."""
    return "." if points <= _FEW_POINTS else ""


def image_grid(images: Tensor, columns: int, title: str):
    """Draw images row by row."""
    rows = len(images) // columns
    figure = new_figure(0.5 * columns, 0.5 * rows + 0.3)
    axes = figure.subplots()
    draw_images(axes, images, columns)
    axes.set_title(title, fontsize=10)
    return figure


@torch.no_grad()
def reconstructions(
    encoder: Callable[[Tensor], tuple[Tensor, Tensor]],
    decoder: Decoder,
    x: Tensor,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Images, decoded at their mean and at one draw, as the rows of `rows_of_images`.

    Without a generator there is no draw: a deterministic encoder has no variance.
    """
    mean, log_var = encoder(x)
    rows = {"test image": x, "f(mean)": decoder(mean)}
    if generator is None:
        return rows
    noise = torch.randn(1, *mean.shape, generator=generator, device=mean.device)
    sampled = draw(mean, log_var, noise).z[0]
    return rows | {"f(z), z ~ q(z|x)": decoder(sampled)}


def rows_of_images(rows: dict[str, Tensor]):
    """Draw rows of equally many images, each under its name."""
    columns, _, size, _ = next(iter(rows.values())).shape
    names = max(1.2, 0.065 * max(map(len, rows)) + 0.1)
    figure = new_figure(0.5 * columns + names, 0.5 * len(rows) + 0.1)
    axes = figure.subplots()
    draw_images(axes, torch.cat(list(rows.values())), columns)
    axes.set_yticks(centres(len(rows), size), list(rows), fontsize=9)
    axes.tick_params(left=False)
    return figure


@torch.no_grad()
def traversals(
    decoder: Decoder,
    z: Tensor,
    kl: Sequence[float],
    *,
    limit: float = 3.0,
    steps: int = 11,
    measure: str = "KL",
):
    """Draw f along every latent dimension from -limit to limit, the others held at z ``[m]``.

    Args:
        decoder: f.
        z: where the others are held.
        kl: mean KL of each dimension in nats, or another measure of what it carries; those of the
            largest come first.
        limit: end of the range, in prior standard deviations.
        steps: images a dimension.
        measure: what `kl` is.
    """
    order = sorted(range(len(z)), key=lambda i: -kl[i])
    ticks = torch.linspace(-limit, limit, steps, device=z.device, dtype=z.dtype)
    blocks = math.ceil(len(order) / _TRAVERSAL_ROWS)
    rows = math.ceil(len(order) / blocks)
    figure = new_figure(blocks * (0.4 * steps + 1.3), 0.4 * rows + 0.9)
    panels = figure.subplots(1, blocks, squeeze=False)[0]
    for axes, start in zip(panels, range(0, len(z), rows), strict=True):
        dimensions = order[start : start + rows]
        latents = z.repeat(len(dimensions), steps, 1)
        for row, dimension in enumerate(dimensions):
            latents[row, :, dimension] = ticks
        images = decoder(latents.flatten(0, 1))
        draw_images(axes, images, steps)
        height, width = images.shape[-2:]
        labels = [f"$z_{{{i + 1}}}$  {measure} {kl[i]:.2f}" for i in dimensions]
        axes.set_yticks(centres(len(labels), height), labels, fontsize=8)
        first, *_, last = centres(steps, width)
        ends = [f"{value:g}" for value in (-limit, 0, limit)]
        axes.set_xticks([first, (first + last) / 2, last], ends, fontsize=8)
        axes.tick_params(length=0)
        axes.set_xlabel("$z_i$", fontsize=9)
    unit = " in nats" if measure == "KL" else " of the means"
    panels[0].set_ylabel(f"dimension, {measure}{unit}", fontsize=8)
    figure.suptitle("Decoder output along each latent dimension, the others held", fontsize=10)
    return figure


@torch.no_grad()
def manifold(decoder: Decoder, device: torch.device, count: int = 20, limit: float = 5.0):
    """Draw f over [-limit, limit]^2, for m = 2."""
    figure = new_figure(6.4, 6.4)
    axes = figure.subplots()
    draw_manifold(axes, decoder, device, count, limit)
    axes.set_title("Decoder output f(z) over the latent plane", fontsize=10)
    return figure


@torch.no_grad()
def draw_manifold(
    axes, decoder: Decoder, device: torch.device, count: int = 20, limit: float = 5.0
) -> None:
    """Draw what `manifold` shows into axes of one's own."""
    ticks = torch.linspace(-limit, limit, count, device=device)
    # Rows from the top: z_2 falls, as on the page.
    z = torch.cartesian_prod(ticks.flip(0), ticks).flip(1)
    images = decoder(z)
    # The middle of each image lies at its z.
    size = images.shape[-1]
    edge = limit + size / 2 * 2 * limit / ((count - 1) * (size + _rule(size)))
    axes.imshow(
        _tile(images, count),
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(-edge, edge, -edge, edge),
    )
    axes.set_xlabel("$z_1$")
    axes.set_ylabel("$z_2$")


def kl_bars(kl: Sequence[float], epsilon: float):
    """Draw the mean KL of each latent dimension, sorted, with the threshold of collapse."""
    figure = new_figure(6.4, 2.6)
    axes = figure.subplots()
    axes.bar(range(1, len(kl) + 1), sorted(kl, reverse=True), width=0.8)
    axes.axhline(epsilon, color="black", linewidth=0.8, linestyle="--")
    # Beside the axes, where there is no bar.
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(f"{epsilon:g} nats", (1, epsilon), (3, 0), **place, fontsize=8, va="center")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("latent dimension, sorted", fontsize=9)
    axes.set_title("Mean KL(q || p) of each latent dimension (nats)", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _rule(size: int) -> int:
    """Pixels between images of that height or width; as wide on paper whatever it is."""
    return max(1, round(size / 32))


def centres(count: int, size: int) -> list[float]:
    """The middles of `count` images of that height or width, in pixels of `_tile`'s sheet."""
    return [(size + _rule(size)) * i + (size - 1) / 2 for i in range(count)]


def _tile(images: Tensor, columns: int) -> np.ndarray:
    """Lay images ``[N, C, H, W]`` out row by row, with grey rules between them.

    The place of an image that is all NaN is left white.

    Returns:
        ``[H', W']`` or, in colour, ``[H', W', 3]``, in [0, 1].
    """
    down, across = (_rule(size) for size in images.shape[-2:])
    ruled = F.pad(images.clamp(0, 1).cpu(), (0, across, 0, down), value=_RULE_GREY)
    ruled[images.isnan().flatten(1).all(1).cpu()] = 1.0
    rows = ruled.unflatten(0, (-1, columns))
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    # Between images alone, not behind the last.
    return sheet[:-down, :-across].squeeze(-1).numpy()


def draw_images(axes, images: Tensor, columns: int) -> None:
    """Draw images row by row into axes of one's own."""
    axes.imshow(_tile(images, columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
