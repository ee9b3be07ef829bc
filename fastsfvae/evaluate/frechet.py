"""Distances between sets of images in a feature space: FID and KID. Needs torchmetrics."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import pickle
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsfvae import _checks
from fastsfvae.evaluate._decode import Progress

_BATCH = 250
_INCEPTION_FEATURES = 2048
# With these digits begins the SHA-256 of the file of weights that published numbers rest on; they
# stand in its name too.
_PUBLISHED_WEIGHTS = "6726825d"
# How far the features of an image may move, of the largest, when it is alone in its batch: other
# kernels round otherwise, in half precision or TF32 by up to some percent.
_ROUNDING = 0.05
# The customary size of KID's subsets; of fewer than twice as many images a subset is a half, as
# subsets that are nearly all images are nearly all alike.
_SUBSET = 1000


class FrechetDistance(NamedTuple):
    """Distances, and what they hold for.

    Attributes:
        fid: Frechet distance between Gaussians fitted to the features.
        kid: mean of the unbiased squared maximum mean discrepancy over 100 random subsets (cubic
            polynomial kernel). Each has 1,000 images, or half of the smaller set where that is
            less, but at least two.
        kid_spread: its standard deviation over the subsets: that of a distance of so many images,
            not the error of `kid`. NaN for two images of each kind, as each subset is all of them.
        real_images: number of real images.
        generated_images: number of generated images.
        features: dimension of the feature space.
        extractor: name of the network that computes the features.
        weights_sha256: of that network's weights and buffers, names and shapes included.
        comparable: whether network and weights are the Inception that published numbers rest on.
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

    Attributes:
        published: whether the weights are those that published numbers rest on, by their file.

    Args:
        weights: path of its weights, a file of torch-fidelity's; None downloads them.

    Raises:
        ValueError: for a path without a file, or a file of something else.
        RuntimeError: where torchmetrics or torch-fidelity is missing.
        OSError: where the weights cannot be downloaded.
    """

    num_features = _INCEPTION_FEATURES

    def __init__(self, weights: str | os.PathLike[str] | None) -> None:
        super().__init__()
        _require("inception", "torchmetrics", "torch_fidelity")
        # Not torchmetrics' version of it, which resizes images otherwise than published numbers.
        from torch_fidelity import feature_extractor_inceptionv3 as inception

        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"weights={str(weights)!r} is not a file: give Inception's weights")
        try:
            self.network = inception.FeatureExtractorInceptionV3(
                "inception-v3-compat",
                [str(_INCEPTION_FEATURES)],
                feature_extractor_weights_path=None if weights is None else os.fspath(weights),
            ).eval()
        except Exception as error:
            if weights is None:
                raise
            raise ValueError(
                f"weights={str(weights)!r} are not torch-fidelity's of Inception ({_line(error)}): "
                "give a file of its state_dict"
            ) from error
        if weights is None:
            name = inception.URL_INCEPTION_V3.rpartition("/")[2]
            weights = Path(torch.hub.get_dir(), "checkpoints", name)
        sha256 = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
        self.published = sha256.startswith(_PUBLISHED_WEIGHTS)

    def forward(self, x: Tensor) -> Tensor:
        """Map images in [0, 1], ``[B, 1 or 3, H, W]``, to ``[B, 2048]``."""
        # The network resizes to 299x299 by itself, and takes bytes.
        (features,) = self.network((x.expand(-1, 3, -1, -1) * 255).round().byte())
        return features


def load_extractor(name: str) -> nn.Module:
    """Call ``package.module:function``, which returns a network from images to ``[B, d]``.

    Raises:
        ValueError: where it cannot be imported, raises, or returns something else, in one line.
    """
    module, _, function = name.partition(":")
    # A console script does not search the working directory, where the user's own module lies.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        extractor = getattr(importlib.import_module(module), function)()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"extractor={name!r} cannot be built ({_line(error)}): give package.module:function"
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
    progress: Progress | None = None,
) -> FrechetDistance:
    """FID and KID between two sets of images, through torchmetrics.

    Images are clamped to [0, 1] and handed to the extractor as they are: resizing is its own part.
    It runs in evaluation mode, and has its own mode again afterwards. Two images of each set are
    tried first.

    Args:
        real: ``[N, C, H, W]``, floating point in [0, 1], or an iterable of such batches.
        generated: the same, f(z) without observation noise.
        extractor: maps ``[B, C, H, W]`` to features ``[B, d]``, each image's from that image alone;
            `Inception` for the published FID.
        seed: chooses KID's subsets; torch's global generator is left as it was.
        progress: called with the number of images that the extractor was given since its last call.

    Raises:
        TypeError: for an extractor that is no module, or images that are not floating point.
        ValueError: for fewer than two images; for an extractor that fails, or whose features are
            not finite and ``[B, d]``, or depend on chance or on the other images of a batch.
        RuntimeError: where torchmetrics is missing.
    """
    _require("metrics", "torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    if not isinstance(extractor, nn.Module):
        raise TypeError(f"extractor is a {type(extractor).__name__}: give a torch.nn.Module")
    with _evaluation_mode(extractor):
        named = (("real", real), ("generated", generated))
        opened = [(kind, _tried(extractor, kind, images)) for kind, images in named]
        sets = [_features(extractor, kind, batches, progress) for kind, batches in opened]
    width, other = (features.shape[1] for features in sets)
    if other != width:
        raise ValueError(
            f"the extractor returned {width} features for real images and {other} for generated "
            "ones: give both in one size"
        )
    count = min(map(len, sets))
    if count < 2:
        raise ValueError(f"{count} images: a covariance needs at least two of each kind")
    if count <= width:
        warnings.warn(
            f"{count} images for {width} features: their covariance is singular and the FID biased "
            "upwards; use more images",
            stacklevel=2,
        )
    given = _Given(width)
    subset = max(2, min(count // 2, _SUBSET))
    with warnings.catch_warnings():
        # That features are kept: they are here anyway.
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save")
        metrics = (
            FrechetInceptionDistance(feature=given, normalize=True).set_dtype(torch.float64),
            KernelInceptionDistance(feature=given, subset_size=subset, normalize=True),
        )
    device = sets[0].device
    for metric in metrics:
        for features, is_real in zip(sets, (True, False), strict=True):
            metric.to(device).update(features.to(device), real=is_real)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        kid, kid_spread = metrics[1].compute()
    return FrechetDistance(
        fid=float(metrics[0].compute()),
        kid=float(kid),
        # Subsets that are all alike have no spread, which is not certainty.
        kid_spread=float("nan") if max(map(len, sets)) == subset else float(kid_spread),
        real_images=len(sets[0]),
        generated_images=len(sets[1]),
        features=width,
        extractor=f"{type(extractor).__module__}.{type(extractor).__qualname__}",
        weights_sha256=_digest(extractor),
        comparable=isinstance(extractor, Inception) and extractor.published,
    )


class _Given(nn.Module):
    """The extractor of features that are there already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _tried(extractor: nn.Module, kind: str, images: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches of a set of images, the first two of which the extractor has been tried on."""
    batches = iter(images.split(_BATCH) if isinstance(images, Tensor) else images)
    first = next((batch for batch in batches if not isinstance(batch, Tensor) or len(batch)), None)
    if first is None:
        raise ValueError(f"no {kind} images: give at least two of each kind")
    _checks.floating("images", first)
    two, name = first[:2].clamp(0, 1), type(extractor).__qualname__
    try:
        together, *alone = (extractor(part) for part in (two, *two.split(1)))
    except Exception as error:
        raise ValueError(
            f"the extractor {name} failed on {kind} images {tuple(two.shape)}, {two.dtype}, "
            f"{two.device} ({_line(error)}): it must map them to features [B, d]"
        ) from error
    together = _checked(together, kind, two)
    apart = torch.cat([_checked(f, kind, x) for f, x in zip(alone, two.split(1), strict=True)])
    if (apart - together).abs().max() > _ROUNDING * together.abs().max():
        raise ValueError(
            f"the extractor {name} gives an image other features when it is alone in its batch: it "
            "must treat images one by one and draw no noise (BatchNorm with running statistics)"
        )
    return chain([first], batches)


def _features(
    extractor: nn.Module, kind: str, batches: Iterable[Tensor], progress: Progress | None
) -> Tensor:
    parts = []
    for batch in batches:
        _checks.floating("images", batch)
        if len(batch):
            parts.append(_checked(extractor(batch.clamp(0, 1)), kind, batch))
        if progress is not None:
            progress(len(batch))
    return torch.cat(parts)


def _checked(features: Any, kind: str, images: Tensor) -> Tensor:
    """Features ``[B, d]`` in float64, or a ValueError that says what they are instead."""
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(images):
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"the extractor returned {shape} for {kind} images {tuple(images.shape)}: "
            "it must return [B, d]"
        )
    if not features.dtype.is_floating_point or features.shape[1] == 0:
        raise ValueError(
            f"the extractor returned {features.shape[1]} features of {features.dtype}: it must "
            "return at least one, floating point"
        )
    broken = int((~features.isfinite().all(1)).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(images)} {kind} images have features that are not finite: look at "
            "these images, and at the extractor"
        )
    return features.double()


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        _update(digest, name, value)
    return digest.hexdigest()


def _update(digest: Any, name: str, value: Any) -> None:
    """Take in an entry of a state_dict: a tensor, or what a module's extra state holds."""
    if isinstance(value, dict):
        value = [part for item in value.items() for part in item]
    if isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            _update(digest, f"{name}.{index}", part)
        return
    if not isinstance(value, Tensor):
        digest.update(name.encode() + pickle.dumps(value))
        return
    digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
    if value.is_quantized:
        value = value.dequantize()
    if value.layout != torch.strided:
        value = value.to_dense()
    # In one dimension, as a number cannot be viewed as bytes.
    flat = value.detach().cpu().resolve_conj().resolve_neg().reshape(-1).contiguous()
    digest.update(flat.view(torch.uint8).numpy().tobytes())


def _line(error: BaseException) -> str:
    """The first line of an error, or its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _require(extra: str, *packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)} missing: install what is needed with "
            f'pip install "fastsfvae[{extra}]"'
        )
