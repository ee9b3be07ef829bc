"""Fixtures, a closed network, and a summary of what the tests counted and of the largest errors."""

import gc
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

# Child processes test this tree as well, wherever they stand and whatever is installed.
_PATHS = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATHS))

# Of a test with more cases than this, every so-many-th is quick: a number that the lengths of what
# cases are made of (types, shapes, layouts) do not divide, so that all of them occur.
_QUICK_EVERY = 5

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


def _turn(text):
    part, parts = map(int, text.split("/"))
    if not 1 <= part <= parts:
        raise ValueError(text)
    return slice(part - 1, None, parts)


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
        "--turn", type=_turn, metavar="K/N", help="of the slow tests the K-th of N parts alone"
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


def _mark_slow(items):
    """Leave a few of a test's many cases quick; what takes long by itself is marked where it is."""
    function = [item.nodeid.partition("[")[0] for item in items]
    cases, seen = Counter(function), Counter()
    for item, name in zip(items, function, strict=True):
        if cases[name] > _QUICK_EVERY and seen[name] % _QUICK_EVERY:
            item.add_marker(pytest.mark.slow)
        seen[name] += 1


@pytest.hookimpl(tryfirst=True)  # -m selects by the marks that are given here
def pytest_collection_modifyitems(config, items):
    _mark_slow(items)
    if turn := config.getoption("--turn"):
        items[:] = [item for item in items if item.get_closest_marker("slow")][turn]
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
