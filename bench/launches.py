"""What the paper's workloads launch, recorded without a GPU."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections import Counter
from typing import NamedTuple
from unittest import mock

import fastsfvae as sf
from bench.counting import counted_launches
from bench.peers import SETTINGS, loss_and_gradients
from bench.problems import build_problem, products
from fastsfvae import fused_layers as fused
from fastsfvae import kernels
from fastsfvae.kernels._launch import DeviceLimits
from fastsfvae.kernels._record import Launch, recorded

# The paper's workloads that run on the kernels, and a batch that stands for all sizes.
PAPER = ("celeba16", "mnist2", "collapse200")
BATCH = 64


class Step(NamedTuple):
    """What one step launches.

    Attributes:
        kernels: this library's, in order.
        others: PyTorch's own, by name and number; none where they were not asked for.
    """

    kernels: list[Launch]
    others: Counter[str]


def step(
    workload: str, dtype: str, limits: DeviceLimits, batch: int = BATCH, *, others: bool = False
) -> Step:
    """Launches of decoder and loss, forward and backward, all samples at once, every layer fused.

    Args:
        workload: one of `WORKLOADS`.
        dtype: "bfloat16" (autocast), "tf32" or "float32".
        limits: of the card that launchers choose for.
        batch: samples.
        others: whether to count PyTorch's launches as well.
    """
    # Kernels first: with the interpreter named, they would be the interpreter's.
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    problem = build_problem(workload, batch)
    loss = sf.SamplingFreeLoss(
        problem.decoder, reduction="sum", backend="triton", chunk_size=batch, **SETTINGS
    )
    counted: Counter[str] = Counter()
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), products(dtype), fused("always"):
        with recorded(limits) as launches:
            loss_and_gradients(loss, problem, dtype)
        if others:
            # Again: the first time a plan is made, once and for all.
            with recorded(limits), counted_launches() as counted:
                loss_and_gradients(loss, problem, dtype)
    return Step(launches, counted)
