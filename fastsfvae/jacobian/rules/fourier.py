"""Discrete Fourier transforms: linear, and their adjoints are the transforms back.

The composite ones (torch.fft, stft, istft) are these three with padding, slices and shifts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsfvae.jacobian.rules.jet import Jet, move
from fastsfvae.jacobian.rules.registry import adjoint, rule
from fastsfvae.jacobian.rules.shape import front

aten = torch.ops.aten


def _axes(x: Jet, dim: list[int]) -> list[int]:
    return [front(d, x.primal.ndim) for d in dim]


def _after(axes: list[int], k: int) -> list[int]:
    return [axis + k for axis in axes]


@rule("_fft_c2c")
def complex_to_complex(x: Jet, dim: list[int], normalization: int, forward: bool) -> Jet:
    """Linear over the complex numbers."""
    axes = _axes(x, dim)

    def transformed(t: Tensor, k: int) -> Tensor:
        return aten._fft_c2c(t, _after(axes, k), normalization, forward)

    return move(x, transformed, keeps_batch=0 not in axes)


@adjoint("_fft_c2c")
def _complex_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, dim: list[int], normalization: int, forward: bool
) -> tuple[Jet]:
    axes = _axes(x, dim)
    # The normalisation is a real factor, the same both ways.
    return (move(grad, lambda g, k: aten._fft_c2c(g, _after(axes, k), normalization, not forward)),)


@rule("_fft_r2c")
def real_to_complex(x: Jet, dim: list[int], normalization: int, onesided: bool) -> Jet:
    """Linear; one-sided, the last of the axes has its non-negative frequencies alone."""
    axes = _axes(x, dim)

    def transformed(t: Tensor, k: int) -> Tensor:
        return aten._fft_r2c(t, _after(axes, k), normalization, onesided)

    return move(x, transformed, keeps_batch=0 not in axes)


@adjoint("_fft_r2c")
def _real_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, dim: list[int], normalization: int, onesided: bool
) -> tuple[Jet]:
    axes = _axes(x, dim)

    def back(g: Tensor, k: int) -> Tensor:
        # The frequencies that were left out have no gradient.
        missing = x.primal.shape[axes[-1]] - g.shape[axes[-1] + k]
        if missing:
            shape = list(g.shape)
            shape[axes[-1] + k] = missing
            g = torch.cat([g, g.new_zeros(()).expand(shape)], axes[-1] + k)
        return aten._fft_c2c(g, _after(axes, k), normalization, False).real

    return (move(grad, back),)


@rule("_fft_c2r")
def complex_to_real(x: Jet, dim: list[int], normalization: int, last_dim_size: int) -> Jet:
    """Linear; of each pair of frequencies, the last of the axes has one."""
    axes = _axes(x, dim)

    def transformed(t: Tensor, k: int) -> Tensor:
        return aten._fft_c2r(t, _after(axes, k), normalization, last_dim_size)

    return move(x, transformed, keeps_batch=0 not in axes)


@adjoint("_fft_c2r")
def _halves_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, dim: list[int], normalization: int, *_: Any
) -> tuple[Jet]:
    axes = _axes(x, dim)
    size = out.primal.shape[axes[-1]]

    def back(g: Tensor, k: int) -> Tensor:
        halves = aten._fft_r2c(g, _after(axes, k), normalization, True)
        # Each frequency stands for itself and its negative, but for zero and the highest.
        halves.narrow(axes[-1] + k, 1, (size - 1) // 2).mul_(2)
        return halves

    return (move(grad, back),)


@rule("unfold_backward")
def overlapped(x: Jet, sizes: list[int], dim: int, size: int, step: int) -> Jet:
    """Windows along an axis, added up where they overlap: what `unfold` takes, put back."""
    axis = front(dim, len(sizes))

    def added(t: Tensor, k: int) -> Tensor:
        return aten.unfold_backward(t, [*t.shape[:k], *sizes], axis + k, size, step)

    return move(x, added, keeps_batch=False)


@adjoint("unfold_backward")
def _overlapped_adjoint(
    grad: Jet, out: Jet, needs: tuple, x: Jet, sizes: list[int], dim: int, size: int, step: int
) -> tuple[Jet]:
    axis = front(dim, len(sizes))
    return (move(grad, lambda g, k: g.unfold(axis + k, size, step)),)
