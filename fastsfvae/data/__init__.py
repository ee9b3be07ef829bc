"""The bundled data: 10,000 MNIST digits (ATTRIBUTION.md beside this file)."""

from __future__ import annotations

from importlib import resources
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TRAIN_IMAGES = 9_000


class Digits(NamedTuple):
    """`images` uint8 ``[N, 1, H, W]`` with values 0..255, `labels` int64 ``[N]``."""

    images: Tensor
    labels: Tensor


def digits(split: str, *, padding: int = 0) -> Digits:
    """Load a split of the bundled digits: 9,000 for training, 1,000 for testing.

    Args:
        split: "train" or "test".
        padding: black pixels added on each side of the 28 x 28 image (2 makes it 32 x 32).

    Raises:
        ValueError: for another split or a negative padding.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is not one of 'train', 'test'")
    if padding < 0:
        raise ValueError(f"padding={padding} must not be negative")
    rows = slice(TRAIN_IMAGES) if split == "train" else slice(TRAIN_IMAGES, None)
    path = resources.files(__package__) / "mnist10k.npz"
    with path.open("rb") as file, np.load(file) as archive:
        images = torch.from_numpy(archive["images"][rows].copy())
        labels = torch.from_numpy(archive["labels"][rows].astype(np.int64))
    images = torch.nn.functional.pad(images, (padding,) * 4)
    return Digits(images.unsqueeze(1), labels)
