"""Where kernel tests run: on a CUDA device, or on the CPU in Triton's interpreter."""

import os

import pytest
import torch

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETER
DEVICE = "cuda" if CUDA else "cpu"
if CUDA or INTERPRETER:
    # By default cuDNN rounds float32 operands to TF32, and so do kernels in the interpreter: no
    # bound here, in float32's eps, allows it.
    torch.backends.cudnn.conv.fp32_precision = "ieee"

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


def assert_as_good(got, want, plain, scale, eps=None):
    """Error within twice that of plain PyTorch in the same dtype, plus four roundings of `scale`.

    Args:
        got: what the kernel returned.
        want: the float64 oracle.
        plain: the same formula in plain PyTorch, in the kernel's dtype.
        scale: float64, the largest sum of absolute terms behind any one entry.
        eps: of the products' operands, where it is larger than the dtype's.
    """
    assert got.shape == want.shape
    want = want.to(got.device)
    error = (got.double() - want).abs().max().item()
    plain_error = (plain.double().to(got.device) - want).abs().max().item()
    bound = 2 * plain_error + 4 * (eps or torch.finfo(got.dtype).eps) * float(scale)
    assert error <= bound, f"error {error:.3e} above {bound:.3e} (plain {plain_error:.3e})"
