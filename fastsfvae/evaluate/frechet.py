"""Distances between sets of images in a feature space: FID and KID. Needs torchmetrics."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsfvae import _checks

_BATCH = 250
_INCEPTION_FEATURES = 2048
# The customary size of KID's subsets.
_SUBSET = 1000


class FrechetDistance(NamedTuple):
    """Distances, and what they hold for.

    Attributes:
        fid: Frechet distance between Gaussians fitted to the features.
        kid: mean of the unbiased squared maximum mean discrepancy over random subsets (cubic
            polynomial kernel).
        kid_spread: its standard deviation over the subsets.
        real_images: number of real images.
        generated_images: number of generated images.
        features: dimension of the feature space.
        extractor: name of the network that computes the features.
        weights_sha256: of that network's weights, names and shapes included.
        comparable: whether the network is the Inception that published numbers rest on.
    """

    fid: float
    kid: float
    kid_spread: float
    real_images: int
    generated_images: int
    features: int
    extractor: str
    weights_sha256: str
    comparable: bool


class Inception(nn.Module):
    """The Inception v3 of the published FID, 2048 features; needs torch-fidelity.

    Args:
        weights: path of its weights, a file of torch-fidelity's; None downloads them.

    Raises:
        ValueError: for a path without a file.
        RuntimeError: where torchmetrics or torch-fidelity is missing.
    """

    num_features = _INCEPTION_FEATURES

    def __init__(self, weights: str | os.PathLike[str] | None) -> None:
        super().__init__()
        _require("inception", "torchmetrics", "torch_fidelity")
        from torchmetrics.image.fid import NoTrainInceptionV3

        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"weights={str(weights)!r} is not a file: give Inception's weights")
        self.network = NoTrainInceptionV3(
            name="inception-v3-compat",
            features_list=[str(_INCEPTION_FEATURES)],
            feature_extractor_weights_path=None if weights is None else os.fspath(weights),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images in [0, 1], ``[B, 1 or 3, H, W]``, to ``[B, 2048]``."""
        # The network resizes to 299x299 by itself, and takes bytes.
        return self.network((x.expand(-1, 3, -1, -1) * 255).round().byte())


def load_extractor(name: str) -> nn.Module:
    """Call ``package.module:function``, which returns a network from images to ``[B, d]``.

    Raises:
        ValueError: where it cannot be imported or returns something else, in one line.
    """
    module, _, function = name.partition(":")
    try:
        extractor = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"extractor={name!r} cannot be built ({error}): give package.module:function"
        ) from error
    if not isinstance(extractor, nn.Module):
        raise ValueError(
            f"extractor={name!r} returned {type(extractor).__name__}: return a torch.nn.Module"
        )
    return extractor.eval()


@torch.no_grad()
def frechet_distance(
    real: Tensor | Iterable[Tensor],
    generated: Tensor | Iterable[Tensor],
    extractor: nn.Module,
    *,
    seed: int = 0,
) -> FrechetDistance:
    """FID and KID between two sets of images, through torchmetrics.

    Images are clamped to [0, 1] and handed to the extractor as they are: resizing is its own part.

    Args:
        real: ``[N, C, H, W]``, floating point in [0, 1], or an iterable of such batches.
        generated: the same, f(z) without observation noise.
        extractor: maps ``[B, C, H, W]`` to features ``[B, d]``; `Inception` for the published FID.
        seed: chooses KID's subsets; torch's global generator is left as it was.

    Raises:
        ValueError: for fewer than two images, or features that are not ``[B, d]``.
        RuntimeError: where torchmetrics is missing.
    """
    _require("metrics", "torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    sets = [_features(extractor, images) for images in (real, generated)]
    count, width = min(map(len, sets)), sets[0].shape[1]
    if count < 2:
        raise ValueError(f"{count} images: a covariance needs at least two of each kind")
    if count <= width:
        warnings.warn(
            f"{count} images for {width} features: their covariance is singular and the FID biased "
            "upwards; use more images",
            stacklevel=2,
        )
    given = _Given(width)
    metrics = (
        FrechetInceptionDistance(feature=given, normalize=True).set_dtype(torch.float64),
        KernelInceptionDistance(feature=given, subset_size=min(count, _SUBSET), normalize=True),
    )
    for metric in metrics:
        for features, is_real in zip(sets, (True, False), strict=True):
            metric.to(features.device).update(features, real=is_real)
    devices = [sets[0].device] if sets[0].device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        kid, kid_spread = metrics[1].compute()
    return FrechetDistance(
        fid=float(metrics[0].compute()),
        kid=float(kid),
        kid_spread=float(kid_spread),
        real_images=len(sets[0]),
        generated_images=len(sets[1]),
        features=width,
        extractor=f"{type(extractor).__module__}.{type(extractor).__qualname__}",
        weights_sha256=_digest(extractor),
        comparable=isinstance(extractor, Inception),
    )


class _Given(nn.Module):
    """The extractor of features that are there already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def _features(extractor: nn.Module, images: Tensor | Iterable[Tensor]) -> Tensor:
    batches = images.split(_BATCH) if isinstance(images, Tensor) else images
    parts = []
    for batch in batches:
        _checks.floating("images", batch)
        features = extractor(batch.clamp(0, 1))
        if features.dim() != 2 or len(features) != len(batch):
            raise ValueError(
                f"the extractor returned {tuple(features.shape)} for images {tuple(batch.shape)}: "
                "it must return [B, d]"
            )
        parts.append(features.double())
    if not parts:
        raise ValueError("no images: give at least two of each kind")
    return torch.cat(parts)


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _require(extra: str, *packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)} missing: install what is needed with "
            f'pip install "fastsfvae[{extra}]"'
        )
