"""What is measured, DESIGN's workloads, and what a result must be before it is timed.

The oracle is float64 by torch.func and torch.distributions (peers.py): none of this library's code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsfvae.models import Encoder, ModelConfig, build

NOISE_VAR = 0.5
# The peers know no other: the plain Gaussian.
GAMMA = 1.0
# Samples that are computed again in float64: all of a batch would take longer than the run.
CHECKED = 4
# What tells rounding (and the ReLUs that it flips) from a wrong formula; the error itself stands in
# every row.
TOLERANCE = {"float32": 1e-3, "tf32": 5e-2, "bfloat16": 2e-1}


class Workload(NamedTuple):
    """A model and a batch."""

    model: str
    m: int
    batch: int
    image_shape: tuple[int, int, int]
    output_activation: str = "none"


COLOUR, DIGIT = (3, 64, 64), (1, 28, 28)
WORKLOADS = {
    "celeba16": Workload("conv", 16, 64, COLOUR),
    "celeba32": Workload("conv", 32, 64, COLOUR),
    "celeba64": Workload("conv", 64, 64, COLOUR),
    "celeba16-sigmoid": Workload("conv", 16, 64, COLOUR, "sigmoid"),
    "mnist2": Workload("mlp", 2, 64, DIGIT),
    "collapse200": Workload("mlp", 200, 1000, DIGIT),
    "collapse200-sigmoid": Workload("mlp", 200, 1000, DIGIT, "sigmoid"),
    "tanh": Workload("tanh", 50, 20, DIGIT),
    "celeba16-32px": Workload("conv", 16, 64, (3, 32, 32)),
    # Tests the benchmarks, measures nothing.
    "tiny": Workload("bench.problems:tiny", 2, 2, (1, 8, 8)),
}
# All but the last.
FULL = tuple(WORKLOADS)[:-1]
# The log-density with J given: (B, n, m).
GIVEN = {"m16": (64, 12288, 16), "m64": (64, 12288, 64), "m200": (1000, 784, 200), "m4": (2, 48, 4)}


def tiny(config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """Networks small enough for the interpreter, with the layers of the paper's."""
    outputs, m = torch.Size(config.image_shape).numel(), config.latent_dim
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(outputs, 8), nn.ReLU(), nn.Linear(8, 2 * m))
    doubling = {"kernel_size": 4, "stride": 2, "padding": 1}
    decoder = nn.Sequential(
        *(nn.Linear(m, 16), nn.ReLU(), nn.Unflatten(1, (4, 2, 2))),
        *(nn.ConvTranspose2d(4, 4, **doubling), nn.ReLU()),
        nn.ConvTranspose2d(4, config.image_shape[0], **doubling),
    )
    return Encoder(trunk), decoder


class Problem(NamedTuple):
    """A workload's networks and one batch of it, in float32 and channels-last.

    Attributes:
        encoder: x -> (mean, log_var).
        decoder: z -> x.
        x: ``[B, C, H, W]``.
        mean: ``[B, m]``, a leaf whose gradient is wanted.
        log_var: ``[B, m]``, likewise.
    """

    encoder: nn.Module
    decoder: nn.Module
    x: Tensor
    mean: Tensor
    log_var: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What decoder and loss are differentiated in."""
        return [self.mean, self.log_var, *self.decoder.parameters()]

    @property
    def size(self) -> str:
        """For the reader of a row."""
        m = self.mean.shape[1]
        return f"B={len(self.x)} n={self.x[0].numel()} m={m} channels-last"

    def head(self, count: int = CHECKED) -> Problem:
        """The first samples."""
        x, *latents = (t.detach()[:count] for t in (self.x, self.mean, self.log_var))
        return self._replace(x=x, mean=_leaf(latents[0]), log_var=_leaf(latents[1]))


def build_problem(
    name: str, batch: int | None = None, m: int | None = None, device: str = "cpu"
) -> Problem:
    """A workload, or a variant of it with another batch size or m."""
    workload = WORKLOADS[name]
    size, m = batch or workload.batch, m or workload.m
    torch.manual_seed(0)
    config = ModelConfig(
        *(workload.model, m, workload.image_shape, workload.output_activation), init="kaiming"
    )
    layout = {"device": device, "memory_format": torch.channels_last}
    encoder, decoder = (module.to(**layout) for module in build(config))
    x = torch.rand(size, *workload.image_shape).to(**layout)
    mean, log_var = torch.randn(size, m), torch.randn(size, m) / 4 - 1
    return Problem(encoder, decoder, x, _leaf(mean.to(device)), _leaf(log_var.to(device)))


def given_jacobian(name: str, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """(J [B, m, n], r [B, n], h [B, m]), leaves in float32, the size of a trained decoder's."""
    batch, n, m = GIVEN[name]
    g = torch.Generator().manual_seed(0)
    jacobian = torch.randn(batch, m, n, generator=g) / 50
    residual = torch.randn(batch, n, generator=g)
    latent_var = torch.rand(batch, m, generator=g) + 0.1
    return tuple(_leaf(t.to(device)) for t in (jacobian, residual, latent_var))


def _leaf(t: Tensor) -> Tensor:
    return t.requires_grad_()


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest norm of an error over the norm of its oracle; NaN where anything is NaN."""
    errors = [
        (g.detach().double() - w.detach()).norm() / w.detach().norm().clamp_min(1e-300)
        for g, w in zip(got, want, strict=True)
    ]
    # max() of a tensor, not of floats: it hands a NaN on.
    return float(torch.stack(errors).max())


def rotations(bytes_per_set: float, device: str) -> int:
    """How many input sets exceed twice the L2 cache together, 2 to 8; 1 on the CPU."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return int(max(2, min(8, 2 * cache // bytes_per_set + 1)))


@contextlib.contextmanager
def products(name: str) -> Iterator[None]:
    """Float32 products of matrices and convolutions in TF32 for "tf32", in ieee otherwise."""
    chosen = "tf32" if name == "tf32" else "ieee"
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [s.fp32_precision for s in settings]
    for s in settings:
        s.fp32_precision = chosen
    try:
        yield
    finally:
        for s, value in zip(settings, before, strict=True):
            s.fp32_precision = value


def autocast(name: str, device: str) -> torch.autocast:
    """Autocast to bfloat16 for "bfloat16"; to be entered in each run, for it caches the weights."""
    return torch.autocast(device, torch.bfloat16, enabled=name == "bfloat16")
