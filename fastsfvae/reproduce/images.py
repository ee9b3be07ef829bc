"""The image sets of the paper's experiments (4.2, B.1), and the digits in their place."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastsfvae.reproduce.cells import Options


class Protocol(NamedTuple):
    """How a model of images is trained.

    Attributes:
        settings: of a `TrainConfig`.
        steps: of training.
        latent_dim: m of the qualitative experiments.
        sizes: the m of the quantitative ones.
    """

    settings: dict[str, Any]
    steps: int
    latent_dim: int
    sizes: tuple[int, ...]


ASSUMPTIONS = (
    "the batch size is stated for the runtime alone: 64 throughout",
    "CelebA's crop is not stated: the 148 pixels around the face, to 64x64",
    "on the digits, which the paper does not use here: padded to 32x32, one stage fewer, m = 16, "
    "10,000 steps at a learning rate of 1e-3",
    "gamma = 0.5, the paper's canonical choice; identity output; torch's initial weights",
)


def image_protocol(options: Options, data: str) -> Protocol:
    """The protocol of a set; of any other than the paper's own, that of the digits."""
    if options.quick:
        settings = options.place(data) | {"model": "mlp", "lr": 1e-3}
        return Protocol(settings, 300, 8, (4, 8))
    settings = options.place(data) | {"model": "conv"}
    match data:
        case "celeba":
            return Protocol(settings | {"lr": 1e-4}, 1_000_000, 32, (12, 16, 24, 32, 48, 64))
        case "chairs":
            return Protocol(settings | {"lr": 1e-4}, 1_000_000, 16, (8, 12, 16))
    return Protocol(settings | {"lr": 1e-3}, 10_000, 16, (8, 16, 32))
