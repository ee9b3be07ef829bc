"""The kernels' time model: what it counts, by hand, on a kernel whose counts are known."""

import pytest
import torch

from bench import kernel_model
from bench.kernel_model import KernelTime, StepTime, kernel_time, sector_bytes
from fastsfvae.kernels import _record
from fastsfvae.kernels._launch import DeviceLimits, launch
from fastsfvae.kernels._machine_code import disassemble
from tests._triton import INTERPRETER
from tests.kernels import plain_product as plain

compiles = pytest.mark.skipif(INTERPRETER, reason="the interpreter compiles nothing")
ROWS, COLUMNS, INNER, BLOCK = 256, 32, 320, 64


def product(arch):
    """A recorded launch of four programs of four warps."""
    x = torch.empty(ROWS, INNER, dtype=torch.bfloat16)
    w, y = torch.empty(INNER, COLUMNS, dtype=torch.bfloat16), torch.empty(ROWS, COLUMNS)
    with _record.recorded(DeviceLimits(4, arch)) as launches:
        sizes = {"BLOCK": BLOCK, "COLUMNS": COLUMNS, "num_warps": 4, "num_stages": 3}
        launch(plain.product_kernel, (ROWS // BLOCK,), x, w, y, INNER, **sizes)
    return launches[0]


@compiles
@pytest.mark.parametrize("arch", [89, 90, 120])
def test_sectors_of_a_product(arch):
    recorded = product(arch)
    code = disassemble(recorded.compile(arch).asm["cubin"])
    # A program reads its rows of x and all of w, past L1, and writes its rows of y.
    x, w, y = 2 * BLOCK * INNER, 2 * INNER * COLUMNS, 4 * BLOCK * COLUMNS
    assert sector_bytes(code, recorded, arch) == x + w + y


@compiles
@pytest.mark.parametrize("card, peak", [("RTX 4090", 165.2e12), ("H100", 989.4e12)])
def test_times_of_a_product(card, peak):
    recorded = product(89)
    found = kernel_time("product", recorded, card, "bfloat16")
    assert found.tensor == pytest.approx(2 * ROWS * INNER * COLUMNS / peak)
    bandwidth = kernel_model.CARDS[card].bandwidth
    assert found.dram == (2 * ROWS * INNER + 2 * INNER * COLUMNS + 4 * ROWS * COLUMNS) / bandwidth
    # Four programs are one wave.
    assert found.latency > 2 * kernel_model.LATENCY_CLOCKS / 2.6e9
    assert found.seconds == max(found.limits.values()) and found.tightest == "latency"


def test_a_step_is_the_sum_of_its_kernels_and_launches():
    kernels = [
        KernelTime("a", *(1e-6 * n for n in (3, 9, 4, 5, 1)), launch=None),
        KernelTime("b", *(1e-6 * n for n in (3, 2, 8, 5, 1)), launch=None),
    ]
    assert [k.tightest for k in kernels] == ["issue", "l2"]
    assert [k.floor for k in kernels] == pytest.approx([5e-6, 5e-6])
    found = StepTime(kernels, others=3)
    assert found.launches == 5
    assert found.seconds == pytest.approx(17e-6 + 5 * kernel_model.LAUNCH_SECONDS)
