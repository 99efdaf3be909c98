"""Progress of a sweep: a live bar with ETA on a terminal, plain lines elsewhere. An observer of pool events."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.events import (
    Event,
    PoolDraining,
    PoolWaiting,
    ReplicaLost,
    ReplicaReleased,
    UnitDone,
    UnitFailed,
    UnitRetried,
    UnitStarted,
)
from pipeline.plan import Unit
from pipeline.redaction import redact
from pipeline.wording import plain

PLAIN_SECONDS = 10.0
"""How often a line is printed where there is no terminal."""
WAITING_SECONDS = 60.0
"""How often it is said that there is no replica, unless the reason changes."""


class SweepProgress:
    """Show units done, cells, rate and time left; use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.total = self.done = self.cells = self.failed_cells = self.total_cells = 0
        self._started = self._last_line = time.monotonic()
        self._waiting, self._said_waiting = "", 0.0
        self._live = self.console.is_terminal
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("units, {task.fields[cells]} cells"),
            TimeElapsedColumn(),
            TextColumn("about {task.fields[left]} left"),
            console=self.console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("sweep", total=None, cells=0, left="?")

    def __enter__(self) -> SweepProgress:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def start(self, todo: int, total: int, cells: int = 0) -> None:
        """Announce how much there is to do; ``cells`` of the units to run, if known, weigh the time left."""
        self.total, self.total_cells = todo, cells
        self._started = time.monotonic()
        self._progress.update(self._task, total=todo)
        held = total - todo
        self._say(f"{todo} of {total} units to run" + (f", {held} already in the store" if held else ""))

    def observe(self, event: Event, unit: Unit | None) -> None:
        """Take one event."""
        if isinstance(event, UnitDone):
            self.done += 1
            self.cells += event.receipt.cells
            self.failed_cells += event.receipt.failed
            self._progress.update(self._task, advance=1, cells=self.cells, left=self._left())
        elif isinstance(event, UnitFailed):
            self.done += 1
            self._progress.update(self._task, advance=1)
            self._say(f"unit {event.unit} failed after {event.attempts} attempts: {event.error}")
        elif isinstance(event, UnitRetried):
            self._say(f"unit {event.unit} will be tried again: {event.error}")
        elif text := self._told(event):
            self._say(text)
        self._line()

    def _told(self, event: Event) -> str | None:
        """Return the sentence on an event of replicas or of the pool, if it deserves one."""
        match event:
            case UnitStarted(copy=True):
                return f"unit {event.unit} takes long: replica {event.replica} runs a copy of it"
            case ReplicaLost():
                again = "" if event.again_in_s is None else f"; it starts again in {event.again_in_s:.0f} s"
                return f"replica {event.replica} was lost: {event.error}{again}"
            case ReplicaReleased():
                return f"replica {event.replica} was released: {event.reason}"
            case PoolDraining():
                return f"draining: {event.units} running units have {event.limit_s:.0f} s to finish"
            case PoolWaiting() if self._is_news(event):
                return f"waiting for a replica since {event.seconds:.0f} s: {event.reason}"
        return None

    def _is_news(self, event: PoolWaiting) -> bool:
        now = time.monotonic()
        if event.reason == self._waiting and now - self._said_waiting < WAITING_SECONDS:
            return False
        self._waiting, self._said_waiting = event.reason, now
        return True

    def _line(self) -> None:
        now = time.monotonic()
        if self._live or (now - self._last_line < PLAIN_SECONDS and self.done < self.total):
            return
        self._last_line = now
        elapsed = now - self._started
        self._say(f"{self.done}/{self.total} units, {self.cells} cells, {elapsed:.0f} s, about {self._left()} left")

    def _left(self) -> str:
        # Units differ a hundredfold in cost, and the cheap baselines come first: their cells tell better.
        done, total = (self.cells, self.total_cells) if self.total_cells else (self.done, self.total)
        elapsed = time.monotonic() - self._started
        return f"{elapsed / done * (total - done):.0f} s" if done else "? s"

    def _say(self, text: str) -> None:
        # Errors may hold brackets, which rich would read as markup.
        self.console.print(plain(redact(text), lines=True), highlight=False, markup=False, soft_wrap=True)
