"""Ctrl-C and SIGTERM as a request that is met between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Let a signal set an event, so that no step is left half done; a second one stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # Signals reach the main thread only; there is nothing to defer.
        yield event
        return
    previous = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def defer(signum, frame) -> None:
        event.set()
        restore()

    for number in _SIGNALS:
        signal.signal(number, defer)
    try:
        yield event
    finally:
        restore()
