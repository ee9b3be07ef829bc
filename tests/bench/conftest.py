"""What the benchmarks' tests share."""

import contextlib
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def pretended_cuda(monkeypatch):
    """Stands in for what the timing calls of torch.cuda; 6 ms pass between any two events."""
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 6.0)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    replays = []
    stubs = {
        "Event": lambda enable_timing: event,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": contextlib.nullcontext,
        "graph": contextlib.nullcontext,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: replays.append(1)),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 2**20,
        "max_memory_allocated": lambda: 3 * 2**20,
        "get_device_properties": lambda index: SimpleNamespace(
            L2_cache_size=2**20, uuid="00-11", clock_rate=1_755_000, memory_clock_rate=2_619_000
        ),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    return replays
