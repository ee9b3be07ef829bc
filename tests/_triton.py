"""Where kernel tests run: on a CUDA device, or on the CPU in Triton's interpreter."""

import os

import pytest
import torch

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETER
DEVICE = "cuda" if CUDA else "cpu"

requires_triton = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        not (INTERPRETER or CUDA), reason="needs a CUDA device or TRITON_INTERPRET=1"
    ),
]


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fill what the allocators return with NaN (True for bool): a lane never written must show."""

    def poison(allocate):
        def poisoned(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else 1)

        return poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
