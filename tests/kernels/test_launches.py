"""How many kernels a step of decoder and loss launches, forward and backward, every layer fused."""

import functools
import os
from unittest import mock

import pytest
import torch

import fastsfvae as sf
from bench.launches import import_kernels, step
from bench.problems import build_problem, products
from fastsfvae.kernels._launch import DeviceLimits
from fastsfvae.kernels._record import recorded
from tests._triton import INTERPRETER

H100, RTX_4090 = DeviceLimits(132, 90), DeviceLimits(128, 89)

pytestmark = pytest.mark.skipif(INTERPRETER, reason="launches are recorded, not interpreted")


# What was counted: this library's kernels, and PyTorch's, of which one casts or copies the weights.
# float32 has two launches of a rescue more, TF32 one that rounds the weights; on sm_89 one kernel
# takes both gradients of a layer.
@pytest.mark.parametrize(
    "dtype, limits, kernels, others",
    [
        ("bfloat16", H100, 26, 6),
        ("bfloat16", RTX_4090, 25, 6),
        ("tf32", H100, 29, 6),
        ("float32", H100, 28, 5),
    ],
)
def test_a_step_of_celeba16(dtype, limits, kernels, others):
    found = step("celeba16", dtype, limits, others=True)
    assert 0 < len(found.kernels) <= kernels, [launch.kernel for launch in found.kernels]
    assert 0 < sum(found.others.values()) <= others, found.others


@functools.cache
def _problem():
    # One for all, so that those that share a plan make it once.
    return build_problem("celeba16", 64)


def _launches(run):
    import_kernels()
    given = mock.patch.dict(os.environ, TRITON_INTERPRET="1"), products("float32")
    with given[0], given[1], sf.fused_layers("always"), recorded(H100) as launches:
        run()
    return len(launches)


# Float32 on an H100, as counted; the loss's step has 28. Along directions the first layer takes no
# kernel of the latents' own, and what needs f(z) has one more for it.
@pytest.mark.parametrize(
    "use, most",
    [
        ("pullback", 26),
        ("along 4 directions", 25),
        ("full covariance", 27),
        ("4 probes", 25),
        ("log_volume", 26),
        ("log_volume, damped", 28),
        ("isometry_loss", 25),
        ("kalman_update", 25),
    ],
)
def test_other_uses_run_on_the_same_kernels(use, most):
    decoder, x, mean, log_var = _problem()[1:]
    settings = {"backend": "triton", "chunk_size": 64}
    factor = torch.eye(16).repeat(64, 1, 1)
    loss = sf.SamplingFreeLoss(decoder, **settings)
    probing = sf.SamplingFreeLoss(decoder, likelihood="expected", probes=4, **settings)
    tangents = torch.randn(4, 64, 16)

    def total(found):
        return sum(t.sum() for t in found)

    runs = {
        "pullback": lambda: total(sf.pullback(decoder, mean, x, **settings)),
        "along 4 directions": lambda: total(
            sf.pullback(decoder, mean, x, tangents=tangents, **settings)
        ),
        "full covariance": lambda: loss(x, mean, factor),
        "4 probes": lambda: probing(x, mean, log_var),
        "log_volume": lambda: sf.log_volume(decoder, mean, reduction="mean", **settings),
        "log_volume, damped": lambda: sf.log_volume(
            decoder, mean, damping=0.1, reduction="mean", **settings
        ),
        "isometry_loss": lambda: sf.isometry_loss(decoder, mean, over="sample", **settings),
        "kalman_update": lambda: total(sf.kalman_update(decoder, x, mean, factor, 0.5, **settings)),
    }

    def run():
        leaves = [mean, *decoder.parameters()]
        return torch.autograd.grad(runs[use](), leaves, allow_unused=True)

    assert most - 4 <= _launches(run) <= most
