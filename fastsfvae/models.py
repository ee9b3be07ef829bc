"""The paper's encoders and decoders, built from one small configuration.

    name   encoder                                  decoder                       images
    mlp    n-512-256-2m, ReLU (paper, B.2)          m-256-512-n                   any
    tanh   n-200-200-2m, tanh (paper, 4.3)          m-200-200-n                   any
    linear n-2m                                     m-n (probabilistic PCA)       any
    conv   five 4x4 convolutions and a linear       its deconvolutional reverse   64x64, 32x32
           layer, ReLU (paper, B.1)

A name of the form ``package.module:function`` calls a user's own builder. What is built keeps one
contract: ``encoder(x) -> (mean, log_var)``, both ``[B, m]``, and ``decoder(z) -> [B, C, H, W]``.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastsfvae import _checks

OutputActivation = Literal["none", "sigmoid"]
Init = Literal["torch", "kaiming", "xavier"]
MODELS = ("mlp", "tanh", "linear", "conv")


@dataclass(frozen=True)
class ModelConfig:
    """What to build.

    Attributes:
        name: "mlp", "tanh", "linear", "conv", or "package.module:function" for a builder that is
            called with this configuration and returns (encoder, decoder).
        latent_dim: m, the number of latent dimensions.
        image_shape: (C, H, W) of one image.
        output_activation: "none" or "sigmoid", the decoder's last operation.
        init: "torch" (the layers' own), "kaiming" (He-normal, zero bias) or "xavier"
            (Glorot-uniform, zero bias).
    """

    name: str = "mlp"
    latent_dim: int = 16
    image_shape: tuple[int, int, int] = (1, 28, 28)
    output_activation: OutputActivation = "none"
    init: Init = "torch"

    def __post_init__(self) -> None:
        if self.name not in MODELS and ":" not in self.name:
            raise ValueError(
                f"model={self.name!r} is not one of {', '.join(map(repr, MODELS))}: for your own, "
                "give package.module:function"
            )
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim={self.latent_dim} must be at least 1")
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(f"image_shape={self.image_shape} must be three positive sizes C, H, W")
        _checks.choice("output_activation", self.output_activation, ("none", "sigmoid"))
        _checks.choice("init", self.init, ("torch", "kaiming", "xavier"))


class Encoder(nn.Module):
    """A trunk with 2m outputs, read as the posterior's mean and log-variance.

    Args:
        trunk: maps ``[B, *image_shape]`` to ``[B, 2m]``.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log_var, each ``[B, m]``, of q(z|x) = N(mean, diag(exp(log_var)))."""
        mean, log_var = self.trunk(x).chunk(2, dim=1)
        return mean, log_var


def build(
    config: ModelConfig, own: Callable[[ModelConfig], object] | None = None
) -> tuple[nn.Module, nn.Module]:
    """Build (encoder, decoder) on the CPU in float32, drawing from torch's global generator.

    Args:
        config: what to build.
        own: the builder that a name of the form ``package.module:function`` stands for; it is
            called in place of importing that.

    Raises:
        ValueError: for an image size that the model does not fit, or a builder that cannot be
            imported, raises, or returns something else than an encoder and a decoder of config's
            shapes.
    """
    if ":" in config.name:
        return _build_custom(config, own or _import_builder(config.name))
    if own is not None:
        raise ValueError(
            f"a build function is given but model={config.name!r} is the library's own: leave it "
            "out"
        )
    if config.name == "conv":
        encoder, decoder = _conv(config)
    elif config.name == "tanh":
        encoder, decoder = _mlp(config, hidden=(200, 200), activation=nn.Tanh)
    elif config.name == "linear":
        encoder, decoder = _mlp(config, hidden=(), activation=nn.Identity)
    else:
        encoder, decoder = _mlp(config, hidden=(512, 256), activation=nn.ReLU)
    if config.output_activation == "sigmoid":
        decoder.append(nn.Sigmoid())
    for module in (*encoder.modules(), *decoder.modules()):
        _initialise(module, config.init)
    return Encoder(encoder), decoder


def _mlp(
    config: ModelConfig, hidden: Sequence[int], activation: type[nn.Module]
) -> tuple[nn.Sequential, nn.Sequential]:
    n = math.prod(config.image_shape)

    def stack(sizes: Sequence[int]) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for inputs, outputs in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), activation()]
        # No activation behind the last layer.
        return layers[:-1]

    encoder = nn.Sequential(nn.Flatten(), *stack([n, *hidden, 2 * config.latent_dim]))
    decoder = nn.Sequential(
        *stack([config.latent_dim, *reversed(hidden), n]), nn.Unflatten(1, config.image_shape)
    )
    return encoder, decoder


def _conv(config: ModelConfig) -> tuple[nn.Sequential, nn.Sequential]:
    channels, height, width = config.image_shape
    if height != width or height not in (32, 64):
        raise ValueError(
            f"model='conv' takes 32x32 or 64x64 images, not {height}x{width}: pad or resize them"
        )
    # Stride-2 stages from the image down to 4x4; the 32x32 network has one fewer.
    widths = (32, 32, 64, 64) if height == 64 else (32, 64, 64)

    encoder = nn.Sequential()
    for inputs, outputs in zip((channels, *widths), widths, strict=False):
        encoder.extend([nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.ReLU()])
    encoder.extend([nn.Conv2d(widths[-1], 256, 4), nn.ReLU(), nn.Flatten()])
    encoder.append(nn.Linear(256, 2 * config.latent_dim))

    decoder = nn.Sequential(nn.Linear(config.latent_dim, 256), nn.ReLU())
    decoder.extend([nn.Unflatten(1, (256, 1, 1)), nn.ConvTranspose2d(256, widths[-1], 4)])
    reverse = (*reversed(widths), channels)
    for inputs, outputs in zip(reverse, reverse[1:], strict=False):
        decoder.extend([nn.ReLU(), nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)])
    return encoder, decoder


def _initialise(module: nn.Module, init: Init) -> None:
    if init == "torch" or not isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        return
    if init == "kaiming":
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    else:
        nn.init.xavier_uniform_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _import_builder(name: str) -> Callable[[ModelConfig], object]:
    module_name, _, function_name = name.partition(":")
    # A console script does not search the working directory, where the user's own module lies.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    # The module's own code runs here, and may raise whatever it likes.
    except (Exception, SystemExit) as error:
        raise ValueError(f"model={name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"model={name!r} is not callable: give a function of ModelConfig")
    return function


def _build_custom(
    config: ModelConfig, builder: Callable[[ModelConfig], object]
) -> tuple[nn.Module, nn.Module]:
    with _raising_one_line(config.name):
        pair = builder(config)
    if not (
        isinstance(pair, tuple)
        and len(pair) == 2
        and all(isinstance(module, nn.Module) for module in pair)
    ):
        raise ValueError(
            f"model={config.name!r} returned {type(pair).__name__}: return (encoder, decoder), "
            "two torch.nn.Module"
        )
    _check_contract(config, *pair)
    return pair


@contextlib.contextmanager
def _raising_one_line(name: str) -> Iterator[None]:
    """Turn what a user's code raises into a ValueError of one line that says where."""
    try:
        yield
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())
        raise ValueError(
            f"model={name!r} raised {type(error).__name__} in {last.filename}, line "
            f"{last.lineno}: {text}"
        ) from error


@torch.no_grad()
def _check_contract(config: ModelConfig, encoder: nn.Module, decoder: nn.Module) -> None:
    """Raise ValueError unless the pair keeps the module docstring's contract on two images."""
    latent_shape, images_shape = (2, config.latent_dim), (2, *config.image_shape)
    # In evaluation mode: two blank images must not enter a BatchNorm's running statistics.
    with _raising_one_line(config.name):
        posterior = encoder.eval()(torch.zeros(images_shape))
        output = decoder.eval()(torch.zeros(latent_shape))
    encoder.train()
    decoder.train()
    if not (
        isinstance(posterior, tuple)
        and len(posterior) == 2
        and all(isinstance(t, Tensor) and t.shape == latent_shape for t in posterior)
    ):
        raise ValueError(
            f"model={config.name!r}: encoder(x) of x {images_shape} must return the tuple "
            f"(mean, log_var), each {latent_shape}"
        )
    if not isinstance(output, Tensor) or output.shape != images_shape:
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"model={config.name!r}: decoder(z) of z {latent_shape} returned {given}, "
            f"but the images are {images_shape}"
        )
