"""Many steps: no memory grows and nothing is traced again after the warm-up."""

import gc
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae import _constants
from fastsfvae.jacobian.run.cache import Linearizer
from tests.decoders import M, build

# Samples of the resident memory; the first fifth of the steps is warm-up, or more.
MARKS = 50


def _resident():
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _slope(values):
    """Theil and Sen's: the median of the slopes between all pairs, deaf to a single jump."""
    y = torch.tensor(values, dtype=torch.float64)
    first, second = torch.triu_indices(len(y), len(y), 1)
    return float(((y[second] - y[first]) / (second - first)).median())


def test_the_slope_sees_a_leak_and_no_noise():
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0)).tolist()
    assert abs(_slope(noise)) < 0.05
    assert abs(_slope([value + 3 * i for i, value in enumerate(noise)]) - 3) < 0.05
    assert _slope([0] * 5 + [100] * 35) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("young_heap")
def test_a_long_run_neither_grows_nor_traces_again(request, monkeypatch, tally):
    steps = request.config.getoption("--soak-steps")
    torch.manual_seed(0)
    decoder = build("tanh", torch.float32)
    encoder = nn.Linear(7, 2 * M)
    loss = sf.SamplingFreeLoss(decoder, chunk_size=3)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    data = torch.rand(64, 7)
    traced, trace = [], Linearizer._trace
    monkeypatch.setattr(Linearizer, "_trace", lambda *a: (traced.append(a[1]), trace(*a))[1])

    # Each weight of the KL divergence is a constant, of which so many are kept.
    every, resident, tensors = max(1, steps // MARKS), [], []
    warm = max(steps // 5, _constants._MOST)
    for step in range(steps):
        # The last batch of an epoch is smaller, and a learned noise has its own path.
        x = data[: (8, 8, 8, 5)[step % 4]]
        loss.kl_weight = min(1.0, step / steps)
        value = loss(x, *encoder(x).chunk(2, 1))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step == warm:
            after_warm_up = len(traced)
        if step >= warm and step % every == 0:
            gc.collect()
            tensors.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
            resident.append(_resident())
    tally("a long run", "steps", steps)
    assert bool(value.isfinite()) and after_warm_up == len(traced) > 0
    assert max(tensors) == tensors[0]
    # A leak of one number a step would be 8 bytes; an allocator's noise over a mark is pages.
    allowed = max(8 * every, 4 * resource.getpagesize())
    assert _slope(resident) <= allowed


@pytest.mark.slow
def test_a_compiled_loss_is_compiled_once_for_all_sizes(request):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    decoder = build("tanh", torch.float32)
    loss = torch.compile(
        sf.SamplingFreeLoss(decoder), fullgraph=True, dynamic=True, backend=counter
    )
    counts = []
    for step in range(max(20, request.config.getoption("--soak-steps") // 20)):
        size = 5 + step % 4
        x, mean = torch.rand(size, 7), torch.zeros(size, M, requires_grad=True)
        loss(x, mean, mean - 1).backward()
        counts.append(counter.frame_count)
    assert counts[8] == counts[-1]
