"""The sums by reverse mode, against those by forward mode."""

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae.gram.reverse import reverse_sums
from tests.decoders import DECODERS, M, batch, build


def close(found, want):
    for mine, other in zip(found, want, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).abs().max() <= 1e-12 * other.abs().max()


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("name", DECODERS)
def test_both_modes_agree(name, chunk_size):
    decoder = build(name)
    x, z, _ = (t.detach() for t in batch(decoder))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.no_grad():
        want = sf.pullback(decoder, z, x, backend="reference")[1:]
    with torch.no_grad():
        given = decoder, z, x, (), {}
        close(reverse_sums(*given, chunk_size=chunk_size, total=False), want)
        total = [t.sum(0, keepdim=True) for t in want]
        close(reverse_sums(*given, chunk_size=chunk_size, total=True), total)


def test_inputs_go_with_their_samples():
    class Field(nn.Module):
        def forward(self, z, points, *, table):
            return ((z[:, :2] * points).sum(1, True) * table.sum()).sin()

    z, points, x = torch.randn(3, 5, M, dtype=torch.float64)
    points, x, table = points[:, :2], x[:, :1], torch.randn(3).double()
    with torch.no_grad():
        found = reverse_sums(Field(), z, x, (points,), {"table": table}, chunk_size=2, total=False)
        close(found, sf.pullback(Field(), z, x, points, table=table)[1:])


def test_what_a_forward_writes_is_undone():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, z):
            self.calls = self.calls + 1
            return super().forward(z)

    decoder = Counting(M, 1)
    with torch.no_grad():
        reverse_sums(decoder, torch.ones(3, M), torch.ones(3, 1), (), {}, chunk_size=1, total=True)
    assert decoder.calls == 0
