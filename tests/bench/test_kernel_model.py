"""The kernels' time model: what it counts, by hand, on a kernel whose counts are known."""

from dataclasses import replace

import pytest
import torch

from bench import kernel_model
from bench.kernel_model import KernelTime, OtherTime, StepTime, kernel_time, sector_bytes
from bench.l2_cache import PAGE, L2Cache, Span, spans_of
from bench.launches import Other, divides_with, step
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
    # Of an SM that has one of the programs.
    sm_count = kernel_model.LIMITS[kernel_model._L2_RATES[card][0]].sm_count
    assert found.tensor == pytest.approx(2 * BLOCK * INNER * COLUMNS / (peak / sm_count))
    bandwidth = kernel_model.CARDS[card].bandwidth
    assert found.dram == (2 * ROWS * INNER + 2 * INNER * COLUMNS + 4 * ROWS * COLUMNS) / bandwidth
    # Four programs are one wave.
    assert found.latency > 2 * kernel_model.LATENCY_CLOCKS / 2.6e9
    assert found.seconds == max(found.limits.values()) and found.tightest == "latency"
    x, w, y = (m.bytes for m in recorded.memories.values())
    assert found.asked == x + w * ROWS // BLOCK + y and found.written == {"y_ptr"}
    assert [s[1:] for s in found.spans(recorded)] == [(x, False), (w, False), (y, True)]
    # A launch that asks for a half goes through the front halves.
    half = replace(found, asked=(x + w + y) // 2)
    assert [s.bytes for s in half.spans(recorded)] == [x // 2, w // 2, y // 2]


def test_a_step_is_the_sum_of_its_kernels_and_launches():
    kernels = [
        KernelTime("a", *(1e-6 * n for n in (3, 9, 4, 5, 1)), launch=None),
        KernelTime("b", *(1e-6 * n for n in (3, 2, 8, 5, 1)), launch=None),
    ]
    assert [k.tightest for k in kernels] == ["issue", "l2"]
    assert [k.floor for k in kernels] == pytest.approx([5e-6, 5e-6])
    found = StepTime(kernels, [OtherTime("copy", 1e-6, 3e-6), OtherTime("add", 2e-6, 1e-6)])
    assert found.launches == 4
    launches = 4 * kernel_model.LAUNCH_SECONDS
    assert found.seconds == pytest.approx(22e-6 + launches)
    # L2 spares some of what DRAM takes.
    spared = StepTime(*([replace(x, spared=1e-6) for x in part] for part in found))
    assert spared.seconds == pytest.approx(21e-6 + launches)
    kept = replace(kernels[1], spared=4e-6)
    assert kept.limits["dram"] == pytest.approx(1e-6) and kept.floor == pytest.approx(3e-6)
    assert spared.forgetful() == found


def test_what_was_lately_used_is_found():
    cache = L2Cache(4 * PAGE + 1)
    a, b, c = (Span(at * 100 * PAGE + 16, 2 * PAGE - 16, False) for at in (1, 2, 3))
    assert cache.found([a]) == 0 and cache.found([a]) == a.bytes
    # What is written counts as memory's, and is found when it is read.
    assert cache.found([b._replace(written=True)]) == 0 == cache.found([b._replace(written=True)])
    assert cache.found([a, b]) == a.bytes + b.bytes
    # There is room for two of three.
    assert cache.found([a]) == a.bytes and cache.found([c]) == 0
    assert cache.found([b]) == 0 and cache.found([c]) == c.bytes and cache.found([a]) == 0
    assert cache.found([a._replace(bytes=100)]) == 100
    # Gone through from the front, what is larger than the cache is found at no place.
    large = Span(0, 6 * PAGE, False)
    assert cache.found([large]) == cache.found([large]) == 0
    # Two tensors side by side leave the last half of each.
    cache.found([Span(0, 4 * PAGE, False), Span(50 * PAGE, 4 * PAGE, True)])
    assert cache.found([Span(2 * PAGE, 2 * PAGE, False)]) == 2 * PAGE
    assert cache.found([Span(52 * PAGE, 2 * PAGE, False)]) == 2 * PAGE


def test_the_memory_of_a_part_of_a_tensor():
    stack = torch.empty(3, 8, 5, dtype=torch.bfloat16)
    start = _record.address_of(stack)
    assert spans_of(stack, True) == [Span(start, 240, True)]
    assert spans_of(stack.transpose(0, 2), True) == [Span(start, 240, True)]
    part = [Span(start + 80 * i + 20, 40, False) for i in range(3)]
    assert sorted(spans_of(stack[:, 2:6], False)) == part
    assert spans_of(stack[:1].expand(4, 8, 5), False) == [Span(start, 80, False)]
    assert spans_of(stack[:0], False) == []


@compiles
def test_a_captured_step_takes_few_samples_at_a_time_where_a_cache_is_large():
    assert divides_with(72 * 2**20) and not divides_with(50 * 2**20)
    found = step("celeba16", "bfloat16", DeviceLimits(128, 89), 32, others=True, divides=72 * 2**20)
    whole = step("celeba16", "bfloat16", DeviceLimits(128, 89), 32, others=True)
    tail = [launch for launch in found.kernels if launch.name == "_gram_tail_bwd_kernel"]
    # 16 samples twice, of 17 slots; the last layers' launches come as often.
    assert [launch.values["m_ptr"].shape[0] for launch in tail] == [16, 16]
    assert len(found.kernels) > len(whole.kernels)
    assert len(found.order) == len(found.kernels) + sum(found.others.values())
    # What the parts have of each sample is joined; no stack is copied.
    assert found.others - whole.others == {"cat": 8}
    joined = [x for x in found.order if isinstance(x, Other) and x.name == "cat"]
    assert max(x.moved for x in joined) <= 2 * 32 * 16 * 4
