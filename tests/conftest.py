"""Fixtures and the summary of the largest errors that the tests saw."""

import pytest
import torch

_LARGEST: dict[str, float] = {}


@pytest.fixture
def largest_error():
    """Record an error under a name; the largest of each name is printed after the run."""

    def record(name: str, value: float) -> None:
        _LARGEST[name] = max(value, _LARGEST.get(name, 0.0))

    return record


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter):
    for name, value in sorted(_LARGEST.items()):
        terminalreporter.write_line(f"largest error: {name}: {value:.2e}")
