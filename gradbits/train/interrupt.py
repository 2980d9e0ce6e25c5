"""Ctrl-C as a request: the run stops between two steps, where its state is whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(Exception):
    """The run was asked to stop and has stopped; ``signal`` is the number of the signal that asked."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.signal = number


class StopRequest:
    """Whether somebody asked the run to stop.

    Args:
        shared: the run has several ranks: a signal that this one has ``seen`` stops it once all ranks agree, by setting
            ``signal``.
    """

    def __init__(self, shared: bool = False) -> None:
        self.signal: int | None = None
        self.seen: int | None = None
        self.shared = shared

    def note(self, number: int) -> None:
        """Take a signal."""
        self.seen = self.seen or number
        if not self.shared:
            self.signal = number

    def check(self) -> None:
        """Raise ``Interrupted`` if a stop was requested."""
        if self.signal is not None:
            raise Interrupted(self.signal)


@contextlib.contextmanager
def stop_on_signals(shared: bool = False) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; the second one acts as it always does.

    With ``shared`` a SIGTERM stays a request: torchrun sends one after the terminal's SIGINT, and then waits. Outside
    the main thread, where Python allows no handlers, nothing is changed.
    """
    request = StopRequest(shared)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    former = {number: signal.getsignal(number) for number in signals}

    def note(number: int, frame: FrameType | None) -> None:
        request.note(number)
        for each in signals:
            if not (shared and each == signal.SIGTERM):
                signal.signal(each, former[each])

    for number in signals:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number in signals:
            signal.signal(number, former[number])
