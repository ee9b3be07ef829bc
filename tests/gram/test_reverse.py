"""The sums by reverse mode, against those by forward mode."""

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae.gram.reverse import gram_by_rows, projection
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
        want = sf.pullback(decoder, z, x, backend="reference")
    with torch.no_grad():
        G = gram_by_rows(decoder, z, chunk_size=chunk_size)
        total = gram_by_rows(decoder, z, chunk_size=chunk_size, total=True)
        close([G, total], [want.gram, want.gram.sum(0, keepdim=True)])
        close(projection(decoder, z, x, chunk_size=chunk_size), want[2:])


def test_inputs_go_with_their_samples():
    class Field(nn.Module):
        def forward(self, z, points, *, table):
            return ((z[:, :2] * points).sum(1, True) * table.sum()).sin()

    z, points, x = torch.randn(3, 5, M, dtype=torch.float64)
    points, x, table = points[:, :2], x[:, :1], torch.randn(3).double()
    given = (points,), {"table": table}
    with torch.no_grad():
        want = sf.pullback(Field(), z, x, points, table=table)
        close([gram_by_rows(Field(), z, *given, chunk_size=2)], [want.gram])
        close(projection(Field(), z, x, *given, chunk_size=2), want[2:])


def test_no_graph_is_left_and_none_is_needed():
    decoder = nn.Linear(M, 2)
    z, x = torch.ones(3, M, requires_grad=True), torch.ones(3, 2)
    found = [gram_by_rows(decoder, z), *projection(decoder, z, x)]
    assert not any(t.requires_grad for t in found)
    constant = [gram_by_rows(lambda z: x, z), *projection(lambda z: x, z, 2 * x)]
    assert not constant[0].any() and not constant[1].any() and torch.equal(constant[2], 2 * x[:, 0])
