"""Parts that are layers of torch.nn, as they are, and ways to join parts."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.grammar.part import Shape

# Not Hardsigmoid: PyTorch's own backward takes 1/6 in float32, even for float64.
_ACTIVATIONS = (
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.GELU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.ReLU6,
    nn.PReLU, nn.Identity,
)  # fmt: skip

Build = Callable[[], nn.Module]


class Residual(nn.Module):
    """x + block(x)."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Joined(nn.Module):
    """The results of two branches, one behind the other along axis 1."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.second(x)], 1)


class Gated(nn.Module):
    """One half of axis 1 times a squashed other half."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return a * torch.tanh(b)


class Attention(nn.Module):
    """Self-attention over an image's pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.project = nn.Conv2d(channels, 3 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).flatten(2).transpose(1, 2).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + mixed.transpose(1, 2).reshape(x.shape)


class Twice(nn.Module):
    """The same layer two times: its weights are shared."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def _trained(norm: nn.Module) -> nn.Module:
    """A batch norm with running statistics as after some training."""
    for name, buffer in norm.named_buffers():
        if name == "running_mean":
            nn.init.normal_(buffer)
        if name == "running_var":
            nn.init.uniform_(buffer, 0.5, 2.0)
    return norm


def activation(rng: random.Random) -> nn.Module:
    """One of the activations."""
    return rng.choice(_ACTIVATIONS)()


def layers_of_features(rng: random.Random, size: int) -> list[Build]:
    """What builds a layer of features."""
    width = rng.randint(2, 9)
    return [
        lambda: nn.Linear(size, width),
        lambda: nn.Linear(size, width, bias=False),
        lambda: parametrizations.weight_norm(nn.Linear(size, width)),
        lambda: parametrizations.spectral_norm(nn.Linear(size, width)),
        lambda: nn.LayerNorm(size),
        lambda: nn.RMSNorm(size),
        lambda: _trained(nn.BatchNorm1d(size)),
        lambda: nn.Dropout(0.5),
        lambda: nn.Sequential(nn.Linear(size, 2 * width), nn.GLU(1)),
        lambda: nn.Sequential(nn.Linear(size, 2 * width), Gated()),
        lambda: Twice(nn.Linear(size, size)),
        lambda: nn.Softmax(1),
        lambda: nn.Sequential(nn.Linear(size, 12), nn.Unflatten(1, (3, 2, 2))),
    ]


def layers_of_images(rng: random.Random, shape: Shape) -> list[Build]:
    """What builds a layer of an image."""
    c, h, w = shape
    out, k = rng.randint(1, 4), rng.randint(1, 3)
    scale = rng.choice(["nearest", "bilinear", "bicubic"])
    small = h * w <= 16
    choices: list[Build] = [
        lambda: nn.Conv2d(c, out, k, padding=k // 2, bias=rng.random() < 0.7),
        lambda: nn.Conv2d(c, out, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(c, 2 * c, 3, padding=1, groups=c),
        lambda: nn.Conv2d(c, out, 3, padding=2, dilation=2),
        lambda: nn.Conv2d(c, out, 3, stride=2, padding=1),
        lambda: parametrizations.weight_norm(nn.Conv2d(c, out, 1)),
        lambda: nn.GroupNorm(1, c),
        lambda: _trained(nn.BatchNorm2d(c)),
        lambda: nn.Dropout2d(0.5),
        lambda: nn.AvgPool2d(3, stride=1, padding=1),
        lambda: nn.MaxPool2d(3, stride=1, padding=1),
        lambda: nn.ZeroPad2d((1, 0, 0, 1)),
        lambda: nn.Sequential(nn.Conv2d(c, 2 * out, 1), nn.GLU(1)),
        lambda: Attention(c),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, 6)),
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ]
    if h * w > 1:
        choices.append(lambda: nn.InstanceNorm2d(c, affine=True))
    if small:
        choices += [
            lambda: nn.ConvTranspose2d(c, out, 4, stride=2, padding=1),
            lambda: nn.ConvTranspose2d(c, out, 3, stride=2, padding=1, output_padding=1),
            lambda: nn.ConvTranspose2d(c, out, 2),
            lambda: nn.Upsample(scale_factor=2, mode=scale),
            lambda: nn.Sequential(nn.Conv2d(c, 4 * out, 1), nn.PixelShuffle(2)),
        ]
    return choices
