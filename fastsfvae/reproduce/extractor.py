"""A feature extractor for images of labelled sets, where Inception has nothing to say.

FID and KID need features in which images of one kind are near each other. For 28x28 images of
digits or clothes a small classifier's last hidden layer has them. It is trained here, once a folder
of results, and its numbers compare with none that another extractor gave.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsfvae.data.load import load_labels
from fastsfvae.data.pixels import to_unit
from fastsfvae.training.checkpoint import load_checkpoint, load_modules, save_checkpoint
from fastsfvae.training.config import TrainConfig

FEATURES = 64
_CLASSES = 10
_BATCH, _SOME = 64, 1000


class Classifier(nn.Module):
    """Two convolutions and two linear layers; it gives the last hidden layer, ``[B, 64]``.

    In units of `scale`, the features' root mean square over training images: KID's kernel is a
    polynomial of them.
    """

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, FEATURES), nn.ReLU()),
        )
        self.head = nn.Linear(FEATURES, _CLASSES)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, 1, H, W]`` in [0, 1] to features."""
        return self.trunk(x) / self.scale


def classifier_of(config: TrainConfig, steps: int, folder: Path) -> Classifier:
    """The classifier of a configuration's data set, on the CPU in evaluation mode.

    Args:
        config: names a set with labels.
        steps: of training.
        folder: where it is kept: what is there already is taken.

    Raises:
        FileNotFoundError, ValueError: for a set without labels, or a damaged file.
    """
    path = folder / f"classifier-{config.data}-{steps}.safetensors"
    # One that an earlier version left: figures that it has judged are gone on with.
    earlier = path.with_suffix(".pt")
    path = earlier if earlier.is_file() else path
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier()
        if path.is_file():
            load_modules(path, load_checkpoint(path), classifier=network)
        else:
            _train(network.train(), config, steps)
            folder.mkdir(parents=True, exist_ok=True)
            save_checkpoint(path, {"classifier": network.state_dict(), "steps": steps})
    return network.eval()


def accuracy(network: Classifier, config: TrainConfig) -> float:
    """Part of the test images that it classifies rightly."""
    images = to_unit(config.load_images("test"))
    labels = load_labels(config.data, config.data_dir, "test")
    with torch.no_grad():
        parts = images.split(_SOME)
        found = torch.cat([network.head(network.trunk(part)).argmax(1) for part in parts])
    return float((found == labels).double().mean())


@torch.enable_grad()
def _train(network: Classifier, config: TrainConfig, steps: int) -> None:
    images = config.load_images("train")
    labels = load_labels(config.data, config.data_dir, "train")[: len(images)]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (_BATCH,))
        logits = network.head(network.trunk(to_unit(images[rows])))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        some = network.trunk(to_unit(images[:_SOME]))
        network.scale.copy_(some.square().mean().sqrt())
