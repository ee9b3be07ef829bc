"""Decoders through Fourier transforms, as `CASES`."""

from __future__ import annotations

import torch

from tests.jacobian.complex_cases import GRID, IMAGE, C, R, aten, on, on_real

CASES = {
    "fft": on(
        GRID,
        lambda u: (
            torch.fft.fft(u)
            + torch.fft.ifft(u, norm="ortho")
            + torch.fft.fft(u, norm="forward", dim=1)
            + torch.fft.fft2(u)
            + torch.fft.ifftn(u, dim=(1,), norm="forward")
            + torch.fft.fftshift(torch.fft.fft(u, n=4), 2)
            + torch.fft.ifftshift(u, dim=(1, 2))
        ),
    ),
    "fft_sizes": on(
        GRID, lambda u: torch.fft.fft(u, 7)[..., :3] + torch.fft.ifft(u, 3, norm="ortho")
    ),
    "fft_real_input": on_real(GRID, lambda h: torch.fft.fft(h) + torch.fft.fftn(h, dim=(1, 2))),
    **{
        f"rfft_{size}_{norm}": on_real(
            (3, size),
            lambda h, norm=norm: (
                torch.fft.rfft(h, norm=norm)
                + torch.fft.rfft2(h, norm=norm)
                + torch.fft.rfftn(h, dim=(1, 2), norm=norm).exp()
                + torch.fft.ihfft(h, norm=norm)
            ),
        )
        for size in (4, 5)
        for norm in ("backward", "ortho", "forward")
    },
    **{
        f"irfft_{size}_{norm}": on(
            (3, size // 2 + 1),
            lambda u, norm=norm, size=size: (
                torch.fft.irfft(u, size, norm=norm)
                + torch.fft.irfft2(u, (3, size), norm=norm)
                + torch.fft.irfftn(u, (size,), dim=(2,), norm=norm).exp()
                + torch.fft.hfft(u, size, norm=norm)
            ),
        )
        for size in (6, 7)
        for norm in ("backward", "ortho", "forward")
    },
    "irfft_of_other_sizes": on(
        GRID,
        lambda u: torch.fft.irfft(u, 10)[..., :3] + torch.fft.irfft(u, 3) + torch.fft.irfft(u, 1),
    ),
    "fft_primitives": on(
        IMAGE,
        lambda u: (
            aten._fft_c2c(u, [3, 1, 2], 1, True)
            + aten._fft_r2c(u.real, [1, 3], 2, False)
            + aten._fft_c2r(u[..., :3], [2, 3], 0, 5)
        ),
    ),
    "spectral_convolution": on_real(
        (2, 6, 5), lambda h, w: _spectral_convolution(h, w), ((2, 2, 3, 2), C)
    ),
    "rotary": on_real((4, 3, 2), lambda h: _rotary(h.view(-1, 4, 3, 2))),
    "stft": on_real(
        (16,),
        lambda h: torch.stft(h, 8, 4, window=torch.hann_window(8, dtype=R), return_complex=True),
    ),
    "istft": on(
        (5, 5),
        lambda u: torch.istft(u, 8, 4, window=torch.hann_window(8, dtype=R), length=14),
    ),
}


def _spectral_convolution(h, w):
    """A Fourier neural operator's layer."""
    spectrum = torch.fft.rfft2(h)
    out = torch.zeros_like(spectrum)
    out[:, :, :3, :2] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :3, :2], w)
    return torch.fft.irfft2(out, s=h.shape[-2:])


def _rotary(h):
    angles = torch.outer(torch.arange(4, dtype=R), torch.tensor([1.0, 0.1, 0.01], dtype=R))
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(torch.view_as_complex(h) * turns).flatten(2)
