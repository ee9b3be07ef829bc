"""Fixtures of the tests that watch how often a decoder is traced."""

from __future__ import annotations

import pytest
import torch

import fastsfvae.jacobian.run.cache as engine


@pytest.fixture
def double_precision():
    """Modules and tensors are made in float64, from a fixed seed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def traces(monkeypatch):
    """The batch size of every trace."""
    traced, trace = [], engine.Linearizer._trace

    def counted(self, batch):
        traced.append(batch)
        return trace(self, batch)

    monkeypatch.setattr(engine.Linearizer, "_trace", counted)
    return traced
