"""Files of a run, read back with nothing executed."""

from __future__ import annotations

import fcntl
import os
import weakref
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsfvae.ground.atomic import replacing
from fastsfvae.objectives import NoiseVariance
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.networks import build_networks

CONFIG = "config.json"
CHECKPOINT = "checkpoint.pt"
_FORMAT = "fastsfvae checkpoint 1"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them atomically.

    Raises:
        OSError: where it cannot be written, e.g. on a full disk; the earlier file is intact.
    """
    with replacing(path) as file:
        torch.save({"format": _FORMAT, **state}, file)


class FolderLock:
    """Claims a run's folder for one training process; the system frees it when that one dies.

    Args:
        folder: an existing folder.

    Raises:
        ValueError: where another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        # The lock lasts as long as the descriptor is open.
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise ValueError(
                f"{folder} is being trained by another process: wait for it, or give another --out"
            ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU; never unpickles code.

    Raises:
        ValueError: for a file that is missing, damaged or not this library's, in one line.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name the folder of a run that has a checkpoint")
    try:
        # torch.load does not look at the checksums that torch.save writes.
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file raises errors of many classes; torch's message advises to load it unsafely.
    except Exception as error:
        raise ValueError(
            f"{path} is damaged or not a checkpoint ({type(error).__name__}): restore the file, "
            "or train again"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a checkpoint of fastsfvae (wanted {_FORMAT!r})")
    return state


def load_config(run: Path) -> TrainConfig:
    """Read a run's configuration.

    Raises:
        ValueError: where it is missing, damaged or foreign, in one line.
    """
    path = run / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name the folder of a run")
    try:
        return TrainConfig.from_json(path.read_text())
    # JSON of a thousand brackets ends in a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a run's configuration: {error}") from error


def load_modules(path: Path, state: dict[str, Any], **modules: nn.Module) -> None:
    """Copy the checkpoint's weights into modules named as they were saved.

    Raises:
        ValueError: where names or shapes differ, in one line.
    """
    for name, module in modules.items():
        try:
            module.load_state_dict(state[name])
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} does not hold this {name}'s weights: "
                "its config.json describes another model"
            ) from error


def load(run: str | os.PathLike[str]) -> tuple[nn.Module, nn.Module, TrainConfig]:
    """Load a trained model from the folder of a run.

    Nothing in its files is executed, but a model of your own is imported by the name that its
    config.json gives.

    Args:
        run: the folder, e.g. ``runs/sampling-free-mlp-1``.

    Returns:
        (encoder, decoder, config), on the CPU in evaluation mode: ``encoder(x)`` gives
        (mean, log_var), each ``[B, m]``, of a householder run the covariance's factor ``[B, m, m]``
        in place of log_var; ``decoder(z)`` gives ``[B, C, H, W]``. The configuration's noise_var is
        the one that was learned, where it was.

    Raises:
        ValueError: for a folder that holds no run, or a damaged or foreign file.
    """
    folder = Path(run)
    config = load_config(folder)
    path = folder / CHECKPOINT
    state = load_checkpoint(path)
    # The initial weights are overwritten: they must not advance the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        encoder, decoder = build_networks(config)
    load_modules(path, state, encoder=encoder, decoder=decoder)
    if config.learned_noise_var:
        learned = NoiseVariance()
        load_modules(path, state, noise_var=learned)
        config = replace(config, noise_var=learned().item())
    return encoder.eval(), decoder.eval(), config
