"""Reasons to stop a sweep early, and in good order: a signal, a request in the store, a machine that will go."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from cluster.notice import watch_for
from pipeline.store import Place, StoreError, stop_requested

ASK_SECONDS = 5.0
"""How often the store and the machine are asked."""
_GRACE_S = 10.0
_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopping:
    """Whether to stop, as pools ask it: once there is a reason, it stays.

    Parameters
    ----------
    place, generation : store and lease that a stop request must be for.
    notices : where this machine learns that it will go; see ``cluster.notice``.
    clock : seconds.
    """

    def __init__(
        self, place: Place, generation: int, notices: Sequence[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.reason: str | None = None
        self._place, self._generation, self._clock = place, generation, clock
        self._notice = watch_for(notices)
        self._asked = -ASK_SECONDS + clock()

    def __call__(self) -> str | None:
        """Return the reason to stop, if there is one."""
        if self.reason is None and self._clock() - self._asked >= ASK_SECONDS:
            self._asked = self._clock()
            self.reason = self._requested() or self._notice()
        return self.reason

    def _requested(self) -> str | None:
        # Nobody asks where the store does not answer; whether the sweep can go on shows when it writes.
        with suppress(OSError, StoreError):
            return stop_requested(self._place, self._generation)
        return None

    @contextmanager
    def on_signals(self, drain_s: float, say: Callable[[str], None]) -> Iterator[None]:
        """Take the first Ctrl-C or SIGTERM as a reason; a second one, or running on long after it, interrupts.

        After another reason the first SIGTERM is awaited: who announces that a machine will go sends it next.

        Parameters
        ----------
        drain_s : seconds that units in flight get; after them, and some more, KeyboardInterrupt is raised.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        signalled = False

        def stop(number: int, frame: Any) -> None:
            nonlocal signalled
            if signalled or (self.reason is not None and number == signal.SIGINT):
                raise KeyboardInterrupt
            signalled = True
            name = _SIGNALS[signal.Signals(number)]
            self.reason = self.reason or name
            say(f"{name}: units in flight may finish within {drain_s:g} s; once more stops at once.")
            signal.setitimer(signal.ITIMER_REAL, drain_s + _GRACE_S)

        def interrupt(number: int, frame: Any) -> None:
            raise KeyboardInterrupt

        before = {number: signal.signal(number, stop) for number in _SIGNALS}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, interrupt)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)
