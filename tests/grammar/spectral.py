"""Parts with complex values: spectra, rotations, complex weights, states and phases."""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from torch import nn

from tests.grammar.part import (
    Part,
    Shape,
    as_complex,
    as_real,
    complex_weights,
    on_features,
    on_images,
    weights,
)

NORMS = ("backward", "ortho", "forward")


@on_features
def filtered(rng: random.Random, size: int):
    """A filter of complex weights between rfft and irfft."""
    norm = rng.choice(NORMS)

    def run(own, x):
        return torch.fft.irfft(torch.fft.rfft(x, norm=norm) * own.weight, size, norm=norm)

    return Part(run, weight=complex_weights(size // 2 + 1))


@on_features
def magnitudes(rng: random.Random, size: int):
    """The absolute values of a spectrum beside what it is of."""
    norm = rng.choice(("ortho", "forward"))
    return Part(lambda own, x: x + torch.fft.fft(x, norm=norm).abs())


@on_features
def round_trip(rng: random.Random, size: int):
    """The phases of a spectrum turned by constants."""
    turns = torch.polar(torch.ones(size), torch.linspace(0, 2, size))
    return Part(lambda own, x: torch.fft.ifft(torch.fft.fft(x) * own.turns).real, turns=turns)


@on_features
def phases(rng: random.Random, size: int):
    """Absolute values and angles, away from the origin."""

    def run(own, x):
        values = as_complex(torch.tanh(own.lift(x))) + 2
        return torch.cat([values.abs(), values.angle()], -1)

    return Part(run, lift=nn.Linear(size, 6))


@on_features
def rotary(rng: random.Random, size: int):
    """Pairs rotated by constant angles."""

    def run(own, x):
        pairs = torch.view_as_complex(own.lift(x).view(-1, 4, 2))
        return as_real(pairs * torch.polar(torch.ones_like(own.angles), own.angles))

    return Part(run, lift=nn.Linear(size, 8), angles=torch.arange(4.0))


@on_features
def turned(rng: random.Random, size: int):
    """Pairs rotated by learned angles, through the exponential."""

    def run(own, x):
        return as_real(as_complex(own.lift(x)) * torch.exp(1j * own.angles))

    return Part(run, lift=nn.Linear(size, 6), angles=weights(3))


@on_features
def complex_linear(rng: random.Random, size: int):
    """A linear layer of complex weights."""

    def run(own, x):
        y = F.linear(as_complex(own.lift(x)), own.weight, own.bias)
        return torch.cat([y.real, y.imag, y.abs()], -1)

    return Part(run, lift=nn.Linear(size, 6), weight=complex_weights(2, 3), bias=complex_weights(2))


@on_features
def complex_weight_of_real_input(rng: random.Random, size: int):
    """A real input becomes complex by a cast."""

    def run(own, x):
        y = x.to(torch.complex128) @ own.weight
        return y.real * y.imag

    return Part(run, weight=complex_weights(size, 4, scale=0.4))


@on_features
def modulus_relu(rng: random.Random, size: int):
    """ReLU of the modulus, the phase kept."""

    def run(own, x):
        values = as_complex(own.lift(x))
        modulus = values.abs()
        return as_real(values / (modulus + 0.5) * F.softplus(modulus + own.bias))

    return Part(run, lift=nn.Linear(size, 6), bias=weights(3))


@on_features
def hermitian(rng: random.Random, size: int):
    """hfft of half a spectrum, ihfft of numbers."""
    if rng.random() < 0.5:
        return Part(lambda own, x: as_real(torch.fft.ihfft(x).resolve_conj()))
    return Part(
        lambda own, x: torch.fft.hfft(as_complex(own.lift(x)), norm="ortho"),
        lift=nn.Linear(size, 8),
    )


@on_features
def short_time(rng: random.Random, size: int):
    """The power of a short-time spectrum, or a signal back from it."""
    back = rng.random() < 0.5

    def run(own, x):
        options = dict(n_fft=4, hop_length=2, window=own.window)
        spectrum = torch.stft(own.lift(x), return_complex=True, **options)
        if back:
            return torch.istft(spectrum * own.weight[:, None], length=12, **options)
        return (spectrum.real.square() + spectrum.imag.square() + 1).log()

    window = torch.hann_window(4) + 0.1
    return Part(run, lift=nn.Linear(size, 12), window=window, weight=complex_weights(3))


@on_features
def polar(rng: random.Random, size: int):
    """Complex numbers from their moduli and angles."""

    def run(own, x):
        modulus, angle = own.lift(x).chunk(2, -1)
        values = torch.polar(F.softplus(modulus), angle)
        return as_real(values * values.conj().roll(1, -1))

    return Part(run, lift=nn.Linear(size, 6))


@on_features
def complex_attention(rng: random.Random, size: int):
    """Attention by the real parts of Hermitian products."""

    def run(own, x):
        q, k, v = as_complex(own.lift(x).view(-1, 3, 3, 4)).unbind(1)
        mixed = torch.softmax((q @ k.mH).real, -1).to(v.dtype) @ v
        return mixed.abs()

    return Part(run, lift=nn.Linear(size, 36))


@on_features
def complex_states(rng: random.Random, size: int):
    """A diagonal recurrence of complex states inside the unit circle."""

    def run(own, x):
        decay = torch.exp(torch.complex(-own.rate.exp(), own.angle))
        state = torch.zeros(x.shape[0], 3, dtype=decay.dtype)
        results = []
        for step in own.lift(x).view(-1, 4, 2).unbind(1):
            state = decay * state + step.to(decay.dtype) @ own.into
            results.append((state @ own.out).real)
        return torch.stack(results, 1)

    return Part(
        run,
        lift=nn.Linear(size, 8),
        rate=weights(3),
        angle=weights(3),
        into=complex_weights(2, 3),
        out=complex_weights(3, 2),
    )


@on_features
def complex_functions(rng: random.Random, size: int):
    """An elementwise function of complex numbers in the right half plane."""
    function = rng.choice(
        (torch.exp, torch.log, torch.sqrt, torch.sin, torch.tanh, torch.reciprocal, torch.sgn)
    )

    def run(own, x):
        return as_real(function(as_complex(0.5 * torch.tanh(own.lift(x))) + 1.2))

    return Part(run, lift=nn.Linear(size, 6))


@on_features
def cosine_transform(rng: random.Random, size: int):
    """DCT-II through a spectrum of twice the length."""

    def run(own, x):
        spectrum = torch.fft.rfft(torch.cat([x, x.flip(-1)], -1))[..., :size]
        return (spectrum * torch.exp(-1j * math.pi * own.steps / (2 * size))).real

    return Part(run, steps=torch.arange(float(size)))


@on_features
def complex_writes(rng: random.Random, size: int):
    """The low frequencies written into zeros, as Fourier layers do."""
    kept = max(1, size // 4)

    def run(own, x):
        spectrum = torch.fft.rfft(x)
        written = torch.zeros_like(spectrum)
        written[:, :kept] = torch.einsum("bi,io->bo", spectrum[:, :kept], own.weight)
        return torch.fft.irfft(written, size)

    return Part(run, weight=complex_weights(kept, kept))


@on_images
def filtered_image(rng: random.Random, shape: Shape):
    """A filter of complex weights between rfft2 and irfft2."""
    c, h, w = shape

    def run(own, x):
        spectrum = torch.fft.rfft2(x, norm="ortho") * own.weight
        return torch.fft.irfft2(spectrum, s=(h, w), norm="ortho")

    return Part(run, weight=complex_weights(c, h, w // 2 + 1))


@on_images
def fourier_layer(rng: random.Random, shape: Shape):
    """Channels mixed in the low frequencies, beside a convolution."""
    c, h, w = shape
    rows, columns = max(1, h // 2), max(1, w // 4)

    def run(own, x):
        spectrum = torch.fft.rfftn(x, dim=(-2, -1))
        written = torch.zeros(x.shape[0], c, h, w // 2 + 1, dtype=spectrum.dtype)
        written[:, :, :rows, :columns] = torch.einsum(
            "bixy,ioxy->boxy", spectrum[:, :, :rows, :columns], own.weight
        )
        return own.beside(x) + torch.fft.irfftn(written, s=(h, w), dim=(-2, -1))

    return Part(run, weight=complex_weights(c, c, rows, columns), beside=nn.Conv2d(c, c, 1))


@on_images
def shifted_spectrum(rng: random.Random, shape: Shape):
    """The absolute values of a centred spectrum of both axes."""

    def run(own, x):
        spectrum = torch.fft.fftshift(torch.fft.fft2(x, norm="ortho"), dim=(-2, -1))
        return (spectrum.abs().square() + 1).sqrt()

    return Part(run)


@on_images
def separable_spectrum(rng: random.Random, shape: Shape):
    """FNet's mixing: the real part of a spectrum of two axes, one after the other."""
    return Part(lambda own, x: torch.fft.fft(torch.fft.fft(x, norm="ortho"), dim=1).real)
