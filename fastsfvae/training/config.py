"""The configuration of a training run: one typed dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastsfvae import _checks
from fastsfvae.data.load import DATA_SETS, Loaded, load_set
from fastsfvae.models import Init, ModelConfig, OutputActivation
from fastsfvae.objectives.exact import check_model
from fastsfvae.training import distributed
from fastsfvae.training.methods import MethodSettings
from fastsfvae.training.schedules import Schedule, WarmStart

DataSet = Literal[
    "digits",
    "mnist",
    "fashion-mnist",
    "omniglot",
    "omniglot-images",
    "celeba",
    "chairs",
    "folder",
    "npz",
    "huggingface",
    "webdataset",
]

# What a resumed run may change: how long and where it runs, not what is trained.
CHANGEABLE = ("steps", "device", "backend", "compile", "cuda_graph", "data_dir", "data_budget")

# The fields that every version has written; one that is missing besides takes its default.
_ALWAYS_WRITTEN = ("method", "model", "latent_dim", "seed", "steps")


@dataclass(frozen=True)
class TrainConfig(MethodSettings):
    """Train a Gaussian VAE, by default on the bundled digits (9,000 to train on, 1,000 to test)."""

    model: str = "mlp"
    """mlp, tanh, linear, conv (digits padded to 32x32), or package.module:function for your own."""

    data: DataSet = "digits"
    """The bundled digits, or a set on disk; folder: any images in files, npz: arrays in a .npz,
    .npy or .pt file, huggingface: what save_to_disk of datasets wrote, webdataset: .tar shards."""

    data_dir: str = ""
    """Where the set lies; for npz the file. Debian's fashion-mnist is found without it."""

    channels: int = 0
    """Channels of the images, 1 or 3; 0 is the set's own (3 for folder, 1 for npz)."""

    image_size: int = 0
    """Side of the images in pixels; 0 is the set's own (64 for image files, 28 for npz)."""

    crop: int = -1
    """Side of the centre square taken of an image file; 0: the largest, -1: the set's own."""

    skip_bad: bool = False
    """Go on without image files that cannot be read, and list them in the run's left_out.txt."""

    data_budget: float = 0.0
    """GiB of the device's memory that the training images may take; a larger set is streamed to it
    while it computes. 0: half of what a GPU has free, no limit on the CPU."""

    train_images: int = 0
    """Train on the first so many images only; 0 takes all."""

    latent_dim: int = 16
    """Number of latent dimensions m; 2 adds a figure of the latent plane."""

    batch_size: int = 64
    """Images per step."""

    steps: int = 1_500
    """Optimiser steps in all, those before a resume included."""

    lr: float = 1e-3
    """Learning rate of Adam."""

    noise_var: float = 0.5
    """Variance c of the observation noise, for pixels in [0, 1]."""

    learned_noise_var: bool = False
    """Learn c, from --noise-var on, with the weights (not for vlae and exact-marginal)."""

    schedule_steps: int = 0
    """Steps that the schedules take; 0 is --steps as it was when the run was started."""

    seed: int = 0
    """Seeds the weights, the data order and the sampling noise, each on its own."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA when there is one."""

    backend: Literal["auto", "torch", "triton", "reference"] = "auto"
    """Implementation of the sampling-free loss."""

    precision: Literal["float32", "bf16"] = "float32"
    """bf16: networks and tangents under bfloat16 autocast; sums, the factorisation and the weights
    stay float32."""

    compile: bool = False
    """Compile encoder, decoder and objective with torch.compile."""

    cuda_graph: bool = False
    """Replay the whole step as one CUDA graph, on one GPU (not vlae, exact-marginal,
    householder)."""

    output_activation: OutputActivation = "none"
    """Last operation of the decoder."""

    init: Init = "torch"
    """Initial weights: the layers' own, He-normal or Glorot-uniform with zero bias."""

    def __post_init__(self) -> None:
        self._check_settings()
        _checks.choice("backend", self.backend, _checks.BACKENDS)
        _checks.choice("precision", self.precision, ("float32", "bf16"))
        _checks.noise_var(self.noise_var)
        for name in ("batch_size", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        self._check_method(self.latent_dim, self.compile or self.cuda_graph)
        if self.method == "exact-marginal":
            check_model(self.model, self.latent_dim, self.output_activation)
        self._check_schedules()
        if self.start.steps and self.start.steps >= max(self.steps, self.schedule_steps):
            raise ValueError(
                f"warm_start={self.warm_start!r} with steps={self.steps}: nothing is left for "
                f"method={self.method!r}, give more --steps or a shorter start"
            )
        _checks.choice("data", self.data, tuple(DATA_SETS))
        if self.channels not in (0, 1, 3):
            raise ValueError(f"channels={self.channels} must be 1 or 3, or 0 for the data's own")
        if self.image_size < 0 or self.crop < -1:
            raise ValueError(
                f"image_size={self.image_size} and crop={self.crop} must be sizes in pixels"
            )
        if self.cuda_graph and self.compile:
            raise ValueError("compile and cuda_graph exclude each other: give one of them")
        if self.train_images < 0:
            raise ValueError(f"train_images={self.train_images} must not be negative")
        if not 0 <= self.data_budget < math.inf:
            raise ValueError(f"data_budget={self.data_budget} must be finite and not negative")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr={self.lr!r} must be finite and positive")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**63)")
        self.model_config  # noqa: B018 - its own checks

    def _check_schedules(self) -> None:
        if self.schedule_steps < 0:
            raise ValueError(f"schedule_steps={self.schedule_steps} must not be negative")
        checks = {"gamma": _checks.gamma, "kl_weight": _checks.kl_weight}
        for name, schedule in self.schedules.items():
            if len(schedule.values) > schedule.length:
                raise ValueError(
                    f"{name}_schedule has {len(schedule.values)} values but takes "
                    f"{schedule.length} steps"
                )
            for value in schedule.values:
                checks[name](value)

    @property
    def start(self) -> WarmStart:
        """The first steps, where they are another objective's."""
        return WarmStart.parse(self.warm_start)

    @property
    def schedules(self) -> dict[str, Schedule]:
        """How gamma and kl_weight change, each over the same steps."""
        length = self.schedule_steps or self.steps
        texts = {"gamma": self.gamma_schedule, "kl_weight": self.kl_weight_schedule}
        return {
            name: Schedule.parse(f"{name}_schedule", text, getattr(self, name), length)
            for name, text in texts.items()
        }

    @property
    def padding(self) -> int:
        """Black pixels added on each side of a digit: the convolutional model takes 32x32."""
        return 2 if self.model == "conv" and self._size == 28 else 0

    @property
    def _channels(self) -> int:
        return self.channels or DATA_SETS[self.data].channels

    @property
    def _size(self) -> int:
        return self.image_size or DATA_SETS[self.data].size

    @property
    def model_config(self) -> ModelConfig:
        """The part that says what is built."""
        size = self._size + 2 * self.padding
        return ModelConfig(
            name=self.model,
            latent_dim=self.latent_dim,
            image_shape=(self._channels, size, size),
            output_activation=self.output_activation,
            init=self.init,
        )

    def load_images(self, split: str) -> Tensor:
        """The images of `load_set`, uint8 ``[N, C, H, W]``."""
        return self.load_set(split).images

    def load_set(self, split: str) -> Loaded:
        """Load the "train" or "test" images as the model takes them, with how they were read.

        Raises:
            FileNotFoundError, ValueError, RuntimeError: as `fastsfvae.data.load.load_set`, or
                where the set has fewer than `train_images`.
        """
        loaded = load_set(
            self.data,
            self.data_dir,
            split,
            channels=self._channels,
            size=self._size,
            crop=DATA_SETS[self.data].crop if self.crop == -1 else self.crop,
            padding=self.padding,
            skip_bad=self.skip_bad,
        )
        images = loaded.images
        if split != "train" or not self.train_images:
            return loaded
        if self.train_images > len(images):
            raise ValueError(
                f"train_images={self.train_images} but data={self.data!r} has {len(images)}"
            )
        return loaded._replace(images=images[: self.train_images])

    def resolve_device(self) -> torch.device:
        """The device that `device` names, or RuntimeError / ValueError where there is none."""
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise self._no_device() from error
        if device.type == "cpu" and not device.index:
            return torch.device("cpu")
        if device.type != "cuda":
            raise self._no_device()
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"device={self.device!r}: no CUDA device is usable; give cpu or auto"
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ValueError(
                f"device={self.device!r} but this machine has {torch.cuda.device_count()} CUDA "
                "devices, counted from 0"
            )
        if device.index is None and distributed.size() > 1:
            return torch.device("cuda", distributed.local_rank())
        return device

    def _no_device(self) -> ValueError:
        return ValueError(f"device={self.device!r} is not a device: give auto, cpu or cuda")

    def training_device(self) -> torch.device:
        """`resolve_device`, where the step can run as the configuration says.

        Raises:
            ValueError, RuntimeError: besides, for a CUDA graph without a GPU or of many processes,
                and for compilation without a compiler.
        """
        device = self.resolve_device()
        if self.cuda_graph and device.type != "cuda":
            raise ValueError(f"--cuda-graph needs a GPU, this run is on the {device}: leave it out")
        if self.cuda_graph and distributed.size() > 1:
            raise ValueError("--cuda-graph captures one process: leave it out under torchrun")
        compiler = os.environ.get("CXX", "g++")
        if self.compile and device.type == "cpu" and shutil.which(compiler) is None:
            raise ValueError(f"--compile needs a C++ compiler, {compiler} is missing: leave it out")
        return device

    def to_json(self) -> str:
        """Serialise."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Parse what `to_json` wrote, in this version or in an earlier one of fewer fields.

        Raises:
            ValueError: for text that is not JSON, or fields that are not this class's.
        """
        fields = json.loads(text)
        known = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or not fields.keys() >= set(_ALWAYS_WRITTEN):
            raise ValueError("its fields are not those of a training configuration")
        if unknown := fields.keys() - known.keys():
            raise ValueError(
                f"{', '.join(sorted(unknown))} is not known to this version: resume it with the "
                "version that wrote it"
            )
        for name, value in fields.items():
            # JSON does not tell 1 from 1.0.
            if type(value) is not known[name] and (type(value), known[name]) != (int, float):
                raise ValueError(f"{name}={value!r} is not of type {known[name].__name__}")
        return cls(**fields)
