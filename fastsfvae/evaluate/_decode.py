"""What the estimators share: their noise, their passes through the decoder, the constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastsfvae import _checks

Decoder = Callable[[Tensor], Tensor]
Progress = Callable[[int], object]

# Output elements decoded at one time unless the caller says otherwise: 4 MiB of float32, about what
# a core's caches hold, and many times what keeps a matrix product busy.
_CHUNK_ELEMENTS = 2**20
# Rows of noise drawn at one time: part of what a seed means, so never a function of the chunk size.
_NOISE_ROWS = 1024
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
    """Standard normal rows whose values do not depend on how many are asked for at a time.

    Args:
        columns: numbers in a row.
        like: its device and dtype are the noise's.
        generator: their source; None is torch's global one.
    """

    def __init__(self, columns: int, like: Tensor, generator: torch.Generator | None) -> None:
        self._shape, self._generator = (_NOISE_ROWS, columns), generator
        self._left = like.new_empty(0, columns)

    def take(self, rows: int) -> Tensor:
        """Return the next rows, ``[rows, columns]``."""
        parts, missing = [self._left], rows - len(self._left)
        while missing > 0:
            block = self._left.new_empty(self._shape)
            parts.append(block.normal_(generator=self._generator))
            missing -= _NOISE_ROWS
        joined = torch.cat(parts) if len(parts) > 1 else self._left
        self._left = joined[rows:]
        return joined[:rows]


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
    linearises: bool = False,
) -> Iterator[Pass]:
    """Yield every image with every draw, the images' draws one after another.

    Where the draws of an image fit into a pass, as many images share it as do; else a pass is a
    part of one image's draws. Either way row r of the noise belongs to draw r mod K of image r / K.
    Of proposals that linearise the decoder fewer exist at one time where they are large.
    """
    _checks.latent(mean, log_var)
    _checks.batch(x, mean)
    _checks.noise_var(noise_var)
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    rows = resolve_chunk_size(x, chunk_size)
    draws = min(samples, rows)
    images = max(1, rows // samples)
    noise, group_size, m = None, _IMAGES_AT_ONCE, mean.shape[1]
    if linearises:
        fitting = _JACOBIAN_ELEMENTS // (m * (x[0].numel() + m))
        group_size = max(1, min(group_size, fitting))
    for first in range(0, len(x), group_size):
        last = min(first + group_size, len(x))
        group = slice(first, last)
        proposal = make_proposal(x[group], mean[group], log_var[group])
        noise = noise or NoiseStream(proposal.columns, mean, generator)
        for start in range(first, last, images):
            stop = min(start + images, last)
            for done in range(0, samples, draws):
                count = min(draws, samples - done)
                rows_of_noise = noise.take((stop - start) * count)
                within = slice(start - first, stop - first)
                z, log_density = proposal.draw(
                    within, rows_of_noise.unflatten(0, (stop - start, count))
                )
                log_prior = -0.5 * z.double().square().sum(-1)
                error = squared_error(decoder, x[start:stop], z)
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
    output = decoder(z.flatten(0, 1))
    if not isinstance(output, Tensor) or output.shape != (z.shape[0] * z.shape[1], *x.shape[1:]):
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the decoder returned {given} for {z.shape[0] * z.shape[1]} latents, but x is "
            f"{tuple(x.shape)}: it must map z [B, m] to [B, {', '.join(map(str, x.shape[1:]))}]"
        )
    # Not in place: the decoder may hand out a tensor that it keeps.
    difference = (output.unflatten(0, z.shape[:2]) - x.unsqueeze(1)).flatten(2)
    return torch.linalg.vector_norm(difference, dim=-1).double().square()


def constant(x: Tensor, noise_var: float | Tensor) -> Tensor:
    """-(n/2) log(2 pi c), the part of a log-density that no model changes; 0-d float64, nats."""
    n = x[0].numel()
    c = torch.as_tensor(noise_var, dtype=torch.float64, device=x.device)
    return -0.5 * n * torch.log(2 * math.pi * c)
