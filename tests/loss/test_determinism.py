"""The same bits for the same input: twice in a process, and in processes of their own."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch

import fastsfvae as sf
from tests._triton import DEVICE, requires_triton
from tests.decoders import DECODERS, batch, build

# On a GPU torch refuses products otherwise; cuBLAS reads it when it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
BACKENDS = ["torch", "reference", pytest.param("triton", marks=requires_triton)]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def bits(name, backend):
    """A digest of the loss, its terms and all gradients."""
    decoder = build(name, torch.float32).to(DEVICE)
    tensors = [t.detach().to(DEVICE) for t in batch(decoder.cpu(), 6, torch.float32)]
    decoder, tensors = decoder.to(DEVICE), [t.requires_grad_() for t in tensors]
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    digest = hashlib.sha256()
    for reduction in ("mean", "none"):
        loss = sf.SamplingFreeLoss(decoder, backend=backend, reduction=reduction, chunk_size=4)
        value, terms = loss(*tensors, return_terms=True)
        for t in (value, *terms, *torch.autograd.grad(value.sum(), [*tensors, *parameters])):
            digest.update(t.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["higgins", "residual", "layer_norm"])
def test_the_same_bits_twice(name, backend, deterministic):
    first = bits(name, backend)
    assert first == bits(name, backend)


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "attention"])
def test_every_decoder_under_deterministic_algorithms(name, deterministic):
    assert bits(name, "torch") == bits(name, "torch")


@pytest.mark.slow
def test_the_same_bits_in_every_process(deterministic):
    # Another order of hashing is what tells one process from the next.
    code = "from tests.loss.test_determinism import bits; print(bits('residual', 'torch'))"
    found = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout.strip())
    assert len(found) == 1
