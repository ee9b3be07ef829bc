"""A decoder's loss and every gradient of it against reverse mode, in float64."""

from __future__ import annotations

import warnings

import torch

import fastsfvae as sf
from fastsfvae.jacobian.run.cache import Linearizer

TOLERANCE = 1e-10


def loss_and_gradients(decoder, z, backend, *args, seed=0, **options):
    """The loss and its gradients by z, the log variances and each parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        target = torch.rand(decoder(z, *args).shape, dtype=z.dtype, generator=generator)
    log_var = 0.3 * torch.randn(z.shape, dtype=z.dtype, generator=generator) - 1
    mean, spread = z.clone().requires_grad_(), log_var.requires_grad_()
    wanted = [mean, spread, *(p for p in decoder.parameters() if p.requires_grad)]
    loss = sf.SamplingFreeLoss(decoder, backend=backend, **options)(target, mean, spread, *args)
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return loss.detach(), gradients


def assert_right(decoder, z, *args, swept=True, tolerance=TOLERANCE, oracle=None):
    """Loss and gradients as the oracle's, in chunks and at once; by the adjoints where `swept`.

    The oracle is reverse mode of the decoder, or of `oracle`, the same function in operations that
    PyTorch differentiates right, with the same parameters in the same order.
    """
    with warnings.catch_warnings():
        if swept:
            warnings.filterwarnings("error", message=".*has no tangent rule.*")
        else:
            warnings.simplefilter("ignore")
        want, exact = loss_and_gradients(oracle or decoder, z, "reference", *args)
        scale = max(float(g.abs().max()) for g in exact)
        for chunk_size in (None, 2):
            got, gradients = loss_and_gradients(decoder, z, "torch", *args, chunk_size=chunk_size)
            assert abs(got - want) <= tolerance * max(1.0, abs(float(want)))
            for ours, theirs in zip(gradients, exact, strict=True):
                assert torch.isfinite(theirs).all(), "the oracle is no oracle here"
                assert float((ours - theirs).abs().max()) <= tolerance * max(1.0, scale)
    if swept:
        assert Linearizer(decoder, z, args).plan(len(z)).obstacles == []
