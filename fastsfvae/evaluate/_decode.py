"""What the estimators share: their noise, their passes through the decoder, the constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae._noise import Draws, check_draws, standard_normal

Decoder = Callable[[Tensor], Tensor]
Progress = Callable[[int], object]

# Output elements decoded at one time unless the caller says otherwise: 4 MiB of float32, about what
# a core's caches hold, and many times what keeps a matrix product busy.
_CHUNK_ELEMENTS = 2**20
# Rows of an image's noise drawn at one time, or so: part of what a seed means, so never a function
# of the chunk size.
_NOISE_ROWS = 1024
# Between the seeds of neighbouring images. It is odd: the lowest 32 bits, all that PyTorch's
# generator on the CPU reads, repeat after 2^32 images.
_NEXT_SEED = 0x9E3779B97F4A7C15
# Images whose proposals exist at one time, and the numbers of their Jacobians: 128 MiB of float64.
_IMAGES_AT_ONCE = 64
_JACOBIAN_ELEMENTS = 2**24


class Proposal(Protocol):
    """A density over the latents of some images, from which standard normal noise makes draws."""

    columns: int

    def draw(self, images: slice, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Turn noise ``[b, k, columns]`` into z ``[b, k, m]`` and its log-density ``[b, k]``.

        The density is float64 and without its factor (2 pi)^(-m/2).
        """
        ...


class Pass(NamedTuple):
    """One pass through the decoder: b images (a slice of all), k draws each; ``[b, k]`` float64."""

    images: slice
    log_prior_ratio: Tensor
    squared_error: Tensor


class NoiseStream:
    """Standard normal rows of one image after another.

    An image's rows depend on its number, on how many it has in all and on one number that is drawn
    from the generator: not on the other images, nor on how many rows are asked for at a time.

    Args:
        rows: how many an image has.
        columns: numbers in a row.
        like: its device and dtype are the noise's.
        generator: source of the one number; None is torch's global one.
        draws: kind of the rows; those that depend on each other follow each other.
        block: rows that do, as of `block_size`.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        like: Tensor,
        generator: torch.Generator | None,
        draws: Draws = "iid",
        block: int = 1,
    ) -> None:
        self._seed = int(torch.randint(2**63 - 1, (), generator=generator, device=like.device))
        self._own = torch.Generator(like.device)
        self._rows, self._draws, self._block = rows, draws, block
        # Orthogonal directions need a factorisation, which half precision does not have.
        self._dtype = torch.promote_types(like.dtype, torch.float32)
        self._nothing = like.new_empty(0, columns)

    def start(self, image: int) -> NoiseStream:
        """Go to the first row of an image."""
        self._own.manual_seed((self._seed + image * _NEXT_SEED) % 2**63)
        self._undrawn, self._left = self._rows // self._block, self._nothing
        return self

    def take(self, rows: int) -> Tensor:
        """Return the image's next rows, ``[rows, columns]``."""
        left = self._left
        while left.shape[0] < rows:
            left = torch.cat([left, self._draw()]) if left.shape[0] else self._draw()
        # Of many images with few rows each, every slice counts.
        if left.shape[0] == rows:
            self._left = self._nothing
            return left
        self._left = left[rows:]
        return left[:rows]

    def _draw(self) -> Tensor:
        blocks = min(self._undrawn, max(1, _NOISE_ROWS // self._block))
        self._undrawn -= blocks
        noise = standard_normal(
            (self._block, blocks, self._nothing.shape[1]),
            self._draws,
            device=self._nothing.device,
            dtype=self._dtype,
            generator=self._own,
        )
        in_order = noise[0] if self._block == 1 else noise.transpose(0, 1).flatten(0, 1)
        return in_order.to(self._nothing.dtype)


def block_size(draws: Draws, samples: int, latent_dim: int) -> int:
    """How many draws of an image depend on each other; those of other blocks do not.

    Raises:
        ValueError: where the samples are no whole number of blocks, in one line.
    """
    check_draws(draws, samples)
    if draws == "iid":
        return 1
    if draws == "antithetic":
        return 2
    most = 2 * latent_dim
    if samples > most and samples % most:
        raise ValueError(
            f"draws='orthogonal' with samples={samples}: {latent_dim} latent dimensions have "
            f"blocks of {most}, give a multiple of {most}, or an even number below"
        )
    return min(samples, most)


def passes(
    decoder: Decoder,
    x: Tensor,
    mean: Tensor,
    log_var: Tensor,
    make_proposal: Callable[[Tensor, Tensor, Tensor], Proposal],
    *,
    samples: int,
    noise_var: float | Tensor,
    generator: torch.Generator | None,
    chunk_size: int | None,
    progress: Progress | None,
    first_image: int = 0,
    linearises: bool = False,
    draws: Draws = "iid",
    block: int = 1,
) -> Iterator[Pass]:
    """Yield every image with every draw, the images' draws one after another.

    Where the draws of an image fit into a pass, as many images share it as do; else a pass is a
    part of one image's draws, of whole blocks. The noise of image i is that of number
    `first_image` + i, whatever else is evaluated. Of proposals that linearise the decoder fewer
    exist at one time where they are large.
    """
    _checks.latent(mean, log_var, factor=True)
    _checks.batch(x, mean)
    _checks.noise_var(noise_var)
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    if first_image < 0:
        raise ValueError(f"first_image={first_image} must not be negative")
    rows = resolve_chunk_size(x, chunk_size)
    draws_at_once = min(samples, max(block, rows // block * block))
    images = max(1, rows // samples)
    group_size, m = _IMAGES_AT_ONCE, mean.shape[1]
    if linearises:
        fitting = _JACOBIAN_ELEMENTS // (m * (x[0].numel() + m))
        group_size = max(1, min(group_size, fitting))
    noise = None
    for first in range(0, len(x), group_size):
        last = min(first + group_size, len(x))
        group = slice(first, last)
        proposal = make_proposal(x[group], mean[group], log_var[group])
        noise = noise or NoiseStream(samples, proposal.columns, mean, generator, draws, block)
        for start in range(first, last, images):
            stop = min(start + images, last)
            numbers = range(first_image + start, first_image + stop)
            if images > 1:
                together = torch.stack([noise.start(i).take(samples) for i in numbers])
            else:
                noise.start(numbers[0])
            for done in range(0, samples, draws_at_once):
                count = min(draws_at_once, samples - done)
                rows_of_noise = together if images > 1 else noise.take(count).unsqueeze(0)
                within = slice(start - first, stop - first)
                z, log_density = proposal.draw(within, rows_of_noise)
                log_prior = -0.5 * z.double().square().sum(-1)
                # A block may be larger than a pass through the decoder.
                parts = [squared_error(decoder, x[start:stop], part) for part in z.split(rows, 1)]
                error = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
                yield Pass(slice(start, stop), log_prior - log_density, error)
                if progress is not None:
                    progress((stop - start) * count)


def resolve_chunk_size(x: Tensor, chunk_size: int | None) -> int:
    """Latents decoded at one time, for images like x ``[N, *out]``."""
    if chunk_size is None:
        return max(1, _CHUNK_ELEMENTS // max(1, x[0].numel()))
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    return chunk_size


def squared_error(decoder: Decoder, x: Tensor, z: Tensor) -> Tensor:
    """|x - f(z)|^2 of x ``[b, *out]`` and z ``[b, k, m]``: ``[b, k]``, float64."""
    output = checked_output(decoder(z.flatten(0, 1)), z.shape[0] * z.shape[1], x)
    # Not in place: the decoder may hand out a tensor that it keeps.
    difference = (output.unflatten(0, z.shape[:2]) - x.unsqueeze(1)).flatten(2)
    return torch.linalg.vector_norm(difference, dim=-1).double().square()


def checked_output(output: object, latents: int, x: Tensor) -> Tensor:
    """What a decoder made of so many latents, or a ValueError where that does not fit x."""
    if isinstance(output, Tensor) and output.shape == (latents, *x.shape[1:]):
        return output
    given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(
        f"the decoder returned {given} for {latents} latents, but x is {tuple(x.shape)}: it must "
        f"map z [B, m] to [B, {', '.join(map(str, x.shape[1:]))}]"
    )


def constant(x: Tensor, noise_var: float | Tensor) -> Tensor:
    """-(n/2) log(2 pi c), the part of a log-density that no model changes; 0-d float64, nats."""
    n = x[0].numel()
    c = torch.as_tensor(noise_var, dtype=torch.float64, device=x.device)
    return -0.5 * n * torch.log(2 * math.pi * c)
