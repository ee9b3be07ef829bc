"""Fixtures, a closed network, and a summary of what the tests counted and of the largest errors."""

import gc
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

# Child processes test this tree as well, wherever they stand and whatever is installed.
_PATHS = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATHS))

_HERE = {"127.0.0.1", "::1", "localhost", "", None}
# By subject and by what was counted or measured of it.
_COUNTS: dict[str, dict[str, int]] = {}
_ERRORS: dict[str, dict[str, float]] = {}


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
        "--decoders", type=int, default=100, help="random decoders to check (test_random_decoders)"
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
    parser.addoption(
        "--processes", type=int, default=1, help="bad command lines to start (test_bad_inputs)"
    )
    parser.addoption(
        "--record", type=Path, metavar="FILE", help="write counts and errors there (tests/trust.py)"
    )


@pytest.fixture
def largest_error():
    """Record an error of a subject; the largest by each measure is printed after the run."""

    def record(subject: str, measure: str, value: float) -> None:
        errors, value = _ERRORS.setdefault(subject, {}), float(value)
        # Not max(): a NaN is larger than any error, and stays.
        if math.isnan(value) or value >= errors.get(measure, 0.0):
            errors[measure] = value

    return record


@pytest.fixture
def tally():
    """Add to a count of a subject; the counts are printed after the run."""

    def add(subject: str, what: str, count: int = 1) -> None:
        counts = _COUNTS.setdefault(subject, {})
        counts[what] = counts.get(what, 0) + count

    return add


@pytest.fixture
def young_heap():
    """Let garbage collections see only what the test makes.

    One over all that a whole run has imported and collected takes a second or more.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter):
    for subject in sorted(_COUNTS.keys() | _ERRORS.keys()):
        counts = [f"{count} {what}" for what, count in _COUNTS.get(subject, {}).items()]
        errors = [f"{what} {value:.1e}" for what, value in _ERRORS.get(subject, {}).items()]
        terminalreporter.write_line(f"{subject}: {', '.join(counts + errors)}")


def pytest_sessionfinish(session):
    path = session.config.getoption("--record")
    if path is not None:
        path.write_text(json.dumps({"counts": _COUNTS, "errors": _ERRORS}))
