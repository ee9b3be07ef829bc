"""Random decoders drawn from a grammar of the supported layers, each a function of its seed.

A decoder is a lift of z to features or to an image, up to eight layers, and sometimes a flattening.
A layer keeps its input's kind (features ``[B, F]`` or image ``[B, C, H, W]``) or turns one into the
other; a residual or a concatenation holds layers of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

M = 3
# Not Hardsigmoid: PyTorch's own backward takes 1/6 in float32, even for float64.
_ACTIVATIONS = (
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.GELU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.ReLU6,
    nn.PReLU, nn.Identity,
)  # fmt: skip
# More than this and the oracle's Jacobian takes the time.
_MOST_VALUES = 120

Draw = Callable[[random.Random, tuple[int, ...]], nn.Module]


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


def _activation(rng: random.Random, shape: tuple[int, ...]) -> nn.Module:
    return rng.choice(_ACTIVATIONS)()


def _on_features(rng: random.Random, size: int) -> list[Draw]:
    width = rng.randint(2, 9)
    return [
        lambda r, s: nn.Linear(size, width),
        lambda r, s: nn.Linear(size, width, bias=False),
        lambda r, s: parametrizations.weight_norm(nn.Linear(size, width)),
        lambda r, s: parametrizations.spectral_norm(nn.Linear(size, width)),
        lambda r, s: nn.LayerNorm(size),
        lambda r, s: nn.RMSNorm(size),
        lambda r, s: _trained(nn.BatchNorm1d(size)),
        lambda r, s: nn.Dropout(0.5),
        lambda r, s: nn.Sequential(nn.Linear(size, 2 * width), nn.GLU(1)),
        lambda r, s: nn.Sequential(nn.Linear(size, 2 * width), Gated()),
        lambda r, s: Twice(nn.Linear(size, size)),
        lambda r, s: nn.Softmax(1),
        lambda r, s: nn.Sequential(nn.Linear(size, 12), nn.Unflatten(1, (3, 2, 2))),
    ]


def _on_image(rng: random.Random, shape: tuple[int, ...]) -> list[Draw]:
    c, h, w = shape
    out, k = rng.randint(1, 4), rng.randint(1, 3)
    scale = rng.choice(["nearest", "bilinear", "bicubic"])
    small = h * w <= 16
    choices: list[Draw] = [
        lambda r, s: nn.Conv2d(c, out, k, padding=k // 2, bias=r.random() < 0.7),
        lambda r, s: nn.Conv2d(c, out, 3, padding=1, padding_mode="circular"),
        lambda r, s: nn.Conv2d(c, 2 * c, 3, padding=1, groups=c),
        lambda r, s: nn.Conv2d(c, out, 3, padding=2, dilation=2),
        lambda r, s: nn.Conv2d(c, out, 3, stride=2, padding=1),
        lambda r, s: parametrizations.weight_norm(nn.Conv2d(c, out, 1)),
        lambda r, s: nn.GroupNorm(1, c),
        lambda r, s: _trained(nn.BatchNorm2d(c)),
        lambda r, s: nn.Dropout2d(0.5),
        lambda r, s: nn.AvgPool2d(3, stride=1, padding=1),
        lambda r, s: nn.MaxPool2d(3, stride=1, padding=1),
        lambda r, s: nn.ZeroPad2d((1, 0, 0, 1)),
        lambda r, s: nn.Sequential(nn.Conv2d(c, 2 * out, 1), nn.GLU(1)),
        lambda r, s: Attention(c),
        lambda r, s: nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, 6)),
        lambda r, s: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ]
    if h * w > 1:
        choices.append(lambda r, s: nn.InstanceNorm2d(c, affine=True))
    if small:
        choices += [
            lambda r, s: nn.ConvTranspose2d(c, out, 4, stride=2, padding=1),
            lambda r, s: nn.ConvTranspose2d(c, out, 3, stride=2, padding=1, output_padding=1),
            lambda r, s: nn.ConvTranspose2d(c, out, 2),
            lambda r, s: nn.Upsample(scale_factor=2, mode=scale),
            lambda r, s: nn.Sequential(nn.Conv2d(c, 4 * out, 1), nn.PixelShuffle(2)),
        ]
    return choices


def _draw_layer(rng: random.Random, shape: tuple[int, ...], depth: int) -> nn.Module:
    kind = rng.random()
    if kind < 0.3:
        return _activation(rng, shape)
    if kind < 0.5 and depth:
        branches = [_draw_layer(rng, shape, depth - 1) for _ in range(2)]
        shapes = [_shape_after(branch, shape) for branch in branches]
        if shapes[0] == shape:
            return Residual(branches[0])
        if shapes[0][1:] == shapes[1][1:]:
            return Joined(*branches)
    choices = _on_features(rng, shape[0]) if len(shape) == 1 else _on_image(rng, shape)
    return rng.choice(choices)(rng, shape)


def _shape_after(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(module.eval()(torch.zeros(2, *shape)).shape[1:])


def draw_decoder(seed: int) -> nn.Sequential:
    """The decoder ``[B, 3] -> [B, *out]`` of that seed, in float64 and eval mode."""
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = rng.randint(4, 8)
        lifts = [
            lambda: nn.Linear(M, width),
            lambda: nn.Sequential(nn.Linear(M, 2 * 6), nn.Unflatten(1, (2, 2, 3))),
            lambda: nn.Sequential(nn.Unflatten(1, (M, 1, 1)), nn.ConvTranspose2d(M, 4, (2, 3))),
        ]
        layers: list[nn.Module] = [rng.choice(lifts)()]
        shape = _shape_after(layers[0], (M,))
        for _ in range(rng.randint(1, 8)):
            layer = _draw_layer(rng, shape, depth=2)
            after = _shape_after(layer, shape)
            if torch.Size(after).numel() <= _MOST_VALUES:
                layers.append(layer)
                shape = after
        return nn.Sequential(*layers).double().eval()
