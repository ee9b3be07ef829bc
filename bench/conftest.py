"""The suites' options and fixtures for pytest."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from bench import ceilings, suite
from bench.ledger import Recorder
from bench.measure import Context


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastsfvae")
    group.addoption("--full", action="store_true", help="all workloads, and the CPU's peak memory")
    group.addoption("--quick", action="store_true", help="two rounds each: tests the suites only")
    group.addoption("--ledger", type=Path, help="CSV file that every row is appended to")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a benchmark that only --full runs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        slow = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def context(request, tmp_path_factory) -> Context:
    """Where the rows go, and this run's own ceilings, measured first."""
    path = request.config.getoption("--ledger") or tmp_path_factory.mktemp("bench") / "rows.csv"
    recorder = Recorder(path, suite.DEVICE)
    context = Context(suite.DEVICE, request.config.getoption("--quick"), recorder)
    # For every candidate alike.
    torch.backends.cudnn.benchmark = True
    ceilings.part(context)
    # Read back from the rows that were just written.
    return Context(suite.DEVICE, context.quick, recorder)


@pytest.fixture
def timed(benchmark, context, request):
    """Check, time and record a case."""
    return functools.partial(
        suite.run_case, benchmark, context, measure_memory=request.config.getoption("--full")
    )
