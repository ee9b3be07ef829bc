"""Fixtures, a closed network, and the summary of the largest errors that the tests saw."""

import sys

import pytest
import torch

_HERE = {"127.0.0.1", "::1", "localhost", "", None}
_LARGEST: dict[str, float] = {}
_TALLY: dict[str, int] = {}


def _refuse_network(event, arguments):
    """Let no test reach another machine; an audit hook sees what any library tries."""
    host = None
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    if host not in _HERE:
        raise RuntimeError(f"a test asks for the network: {event} {host}")


sys.addaudithook(_refuse_network)


def pytest_addoption(parser):
    parser.addoption(
        "--decoders", type=int, default=500, help="random decoders to check (test_random_decoders)"
    )
    parser.addoption(
        "--kills", type=int, default=10, help="kills of training, converting, saving (test_faults)"
    )
    parser.addoption(
        "--examples", type=int, default=60, help="hostile inputs to draw (test_numerics)"
    )
    parser.addoption(
        "--soak-steps", type=int, default=1000, help="training steps to watch (test_soak)"
    )


@pytest.fixture
def largest_error():
    """Record an error under a name; the largest of each name is printed after the run."""

    def record(name: str, value: float) -> None:
        _LARGEST[name] = max(value, _LARGEST.get(name, 0.0))

    return record


@pytest.fixture
def tally():
    """Add to a count; the counts are printed after the run."""

    def add(name: str, count: int = 1) -> None:
        _TALLY[name] = _TALLY.get(name, 0) + count

    return add


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter):
    for name, count in sorted(_TALLY.items()):
        terminalreporter.write_line(f"count: {name}: {count}")
    for name, value in sorted(_LARGEST.items()):
        terminalreporter.write_line(f"largest error: {name}: {value:.2e}")
