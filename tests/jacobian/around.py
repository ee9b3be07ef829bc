"""A small decoder that a test makes something of, and its loss against the reference."""

from __future__ import annotations

import torch
from torch import nn

import fastsfvae as sf
from fastsfvae.jacobian.run.cache import Linearizer

M, B = 3, 5


class Decoder(nn.Module):
    """tanh of a linear layer, then what a test makes of it."""

    def __init__(self, then=None, **attributes):
        super().__init__()
        self.a = nn.Linear(M, 4)
        self.then = then
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, z, **kwargs):
        h = torch.tanh(self.a(z))
        return h if self.then is None else self.then(self, h, **kwargs)


def latents():
    return torch.randn(B, M, generator=torch.Generator().manual_seed(1))


def check(decoder, *args, swept=True, **kwargs):
    """The loss and its gradients against the reference, to 1e-10 of the largest."""
    z, log_var = latents(), 0.1 * torch.randn(B, M)
    with torch.no_grad():
        x = torch.rand_like(decoder(z, *args, **kwargs))
    parameters = list(decoder.parameters())
    results = []
    for backend in ("torch", "torch", "reference"):
        leaves = [z.clone().requires_grad_(), log_var.clone().requires_grad_()]
        options = {} if backend == "reference" else {"chunk_size": 2}
        loss = sf.SamplingFreeLoss(decoder, backend=backend, **options)(x, *leaves, *args, **kwargs)
        wanted = [*leaves, *parameters]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        results.append((loss.detach(), *grads))
    *ours, reference = results
    scale = max(g.abs().max() for g in reference[1:])
    for got in ours:
        torch.testing.assert_close(got[0], reference[0], rtol=1e-12, atol=0)
        for a, b in zip(got[1:], reference[1:], strict=True):
            assert (a - b).abs().max() <= 1e-10 * scale
    if swept:
        assert Linearizer(decoder, z, args, kwargs).plan(B).obstacles == []
