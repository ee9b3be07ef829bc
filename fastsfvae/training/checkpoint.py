"""Files of a run, read back with nothing executed."""

from __future__ import annotations

import os
import weakref
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from fastsfvae.ground.atomic import replacing
from fastsfvae.ground.locks import file_locks
from fastsfvae.models import ModelConfig
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.networks import build_networks
from fastsfvae.training.objective import learned_modules
from fastsfvae.training.state_file import pack, unpack

CONFIG = "config.json"
CHECKPOINT = "checkpoint.safetensors"
# What an exported model has in its place: the same without the optimiser's part.
EXPORTED = "model.safetensors"
# What versions up to 0.1.0 wrote, by torch.save. It is read and never written.
EARLIER_CHECKPOINT = "checkpoint.pt"
_FORMAT = "fastsfvae checkpoint 2"
_EARLIER_FORMAT = "fastsfvae checkpoint 1"

# Builds (encoder, decoder), as `fastsfvae.models.build` asks of a model of one's own.
Build: TypeAlias = Callable[[ModelConfig], tuple[nn.Module, nn.Module]]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write what `state_file.pack` takes, atomically.

    Raises:
        OSError: where it cannot be written, e.g. on a full disk; the earlier file is intact.
        ImportError, TypeError, ValueError: as `state_file.pack`.
    """
    parts = pack(state, _FORMAT)
    with replacing(path) as file:
        file.writelines(parts)


class FolderLock:
    """Claims a run's folder for one training process; the system frees it when that one dies.

    Args:
        folder: an existing folder.

    Raises:
        RuntimeError: on a system without such locks.
        ValueError: where another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        fcntl = file_locks()
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
    """Read what `save_checkpoint` wrote, or a .pt file of before; on the CPU, executing nothing.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: for a file that is missing, damaged or not this library's, in one line.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name the folder of a run that has a checkpoint")
    read = _read_earlier if path.suffix == ".pt" else _read
    try:
        return read(path)
    except ImportError:
        raise
    # A damaged file raises errors of many classes; torch's message advises to load it unsafely.
    except Exception as error:
        own = type(error) is ValueError
        reason = " ".join(str(error).split()) if own else type(error).__name__
        raise ValueError(
            f"{path} is damaged or not a checkpoint of fastsfvae ({reason}): restore the file, or "
            "remove it where another checkpoint lies beside it, or train again"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    return unpack(path.read_bytes(), _FORMAT)


def _read_earlier(path: Path) -> dict[str, Any]:
    # torch.load does not look at the checksums that torch.save writes.
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(damaged)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state.pop("format") != _EARLIER_FORMAT:
        raise ValueError(f"its format is not {_EARLIER_FORMAT!r}")
    return state


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Read a run's last state.

    A run that an earlier version began has a checkpoint.pt, which stays as it was; that version may
    have gone on with it. A run's state follows from its step, so that of two files the one that has
    done more steps is the later one; of the same steps they hold the same.

    Returns:
        The file that was read, and what it holds.

    Raises:
        ImportError, ValueError: as `load_checkpoint`.
    """
    path, earlier = folder / CHECKPOINT, folder / EARLIER_CHECKPOINT
    if not earlier.is_file():
        return path, load_checkpoint(path)
    found = [(file, load_checkpoint(file)) for file in (path, earlier) if file.is_file()]
    return max(found, key=lambda pair: pair[1].get("step", 0))


def load_config(run: Path) -> TrainConfig:
    """Read a run's configuration.

    Raises:
        ValueError: where it is missing, damaged or foreign, in one line.
    """
    path = run / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name the folder of a run or an export")
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


class Saved(NamedTuple):
    """What a folder's files hold of a trained model.

    Attributes:
        encoder: x -> (mean, log_var).
        decoder: z -> x.
        learned: what was trained beside them, such as the observation noise's variance.
        config: of the run, with the noise_var that was learned, where it was.
        step: optimiser steps done.
    """

    encoder: nn.Module
    decoder: nn.Module
    learned: nn.ModuleDict
    config: TrainConfig
    step: int

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What was trained, by its name in a file."""
        return {"encoder": self.encoder, "decoder": self.decoder, **self.learned}


def load_saved(folder: Path, build: Build | None = None) -> Saved:
    """Read a run's last state, or an exported model; arguments and errors are those of `load`."""
    config = load_config(folder)
    path = folder / EXPORTED
    if not path.is_file():
        path, state = newest_checkpoint(folder)
    elif ":" in config.model and build is None:
        # It may be somebody else's: a file that is loaded must not say what is imported.
        raise ValueError(
            f"{folder} was trained with model={config.model!r}, which is not imported for an "
            "exported model: give the function itself, build=..."
        )
    else:
        state = load_checkpoint(path)
    # The initial weights are overwritten: they must not advance the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        networks = build_networks(config, build)
        saved = Saved(*networks, learned_modules(config), config, int(state["step"]))
    load_modules(path, state, **saved.modules)
    for module in saved.modules.values():
        module.eval()
    if config.learned_noise_var:
        config = replace(config, noise_var=saved.learned["noise_var"]().item())
    return saved._replace(config=config)


def load(
    run: str | os.PathLike[str], *, build: Build | None = None
) -> tuple[nn.Module, nn.Module, TrainConfig]:
    """Load a trained model from the folder of a run, or of an export (`fastsfvae export`).

    Nothing in its files is executed. A model of your own is imported by the name that a run's
    config.json gives; that of an export never is.

    Args:
        run: the folder, e.g. ``runs/sampling-free-mlp-1``.
        build: the function that builds a model of your own, in place of its import; an export of
            such a model is loaded with it alone.

    Returns:
        (encoder, decoder, config), on the CPU in evaluation mode: ``encoder(x)`` gives
        (mean, log_var), each ``[B, m]``, of a householder run the covariance's factor ``[B, m, m]``
        in place of log_var; ``decoder(z)`` gives ``[B, C, H, W]``. The configuration's noise_var is
        the one that was learned, where it was.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: for a folder that holds neither, a damaged or foreign file, or an export of a
            model of your own without `build`.
    """
    saved = load_saved(Path(run), build)
    return saved.encoder, saved.decoder, saved.config
