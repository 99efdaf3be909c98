"""A driver in the world of crashes: what ``run_sweep`` does, one event at a time, and the attempts of its replicas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cluster.events import ReplicaLost, UnitDone, UnitFailed, UnitRetried
from pipeline.layout import Unit
from pipeline.ledger import Ledger
from pipeline.stopping import Stopping
from pipeline.store import DONE, FAILED, Journal, open_or_create
from pipeline.sweep import _Drive
from tests.crash_oracle import UnitKey
from tests.crash_world import Process, World
from tests.synthetic import Receipt, Write

MAX_ATTEMPTS = 2
WINDOW = 3
"""Attempts that the replicas of a driver hold at once."""


@dataclass(eq=False)
class Attempt:
    """What a replica does with a unit: arrays that it has yet to write, in order, and its receipt."""

    unit: Unit
    number: int
    writes: list[Write]
    receipt: Receipt
    spoiled: bool = False

    @property
    def key(self) -> UnitKey:
        """The unit, as status and journal name it."""
        return self.unit.group, self.unit.index

    def write(self, arrays: int | None = None) -> None:
        """Write some more of the arrays, or all that are left."""
        for _ in range(len(self.writes) if arrays is None else min(arrays, len(self.writes))):
            self.writes.pop(0)[3]()


class Driver:
    """A process that drives the store; made as ``run_sweep`` begins.

    Raises
    ------
    StoreError : it is refused, or what it must read is damaged.

    Attributes
    ----------
    attempts : what its replicas hold. memory : states that it was told of and that are not yet safe in the store.
    """

    def __init__(self, world: World, process: Process) -> None:
        self.world, self.process = world, process
        self.attempts: list[Attempt] = []
        self.memory: dict[UnitKey, int] = {}
        store = open_or_create(world.location, world.plan)
        self.lease = world.lease(process)
        self.lease.acquire()
        self.journal = Journal(world.location, self.lease.generation, self.lease.check)
        try:
            store.sweep_partial_files()
            self.ledger = Ledger(store, world.plan, self.journal, self.lease)
            stopping = Stopping(world.location, self.lease.generation, clock=lambda: world.now)
            self.drive = _Drive(world.plan, store, self.ledger, self.journal, stopping, None)
        except Exception:
            self.leave()
            raise
        self._phases = [*world.plan.layout.phases]
        self._queue: Iterator[Unit] | None = None
        self._again: list[tuple[Unit, int]] = []

    def leave(self) -> None:
        """End as ``run_sweep`` ends, whatever the reason is."""
        self.journal.close()
        self.lease.release()

    def stop(self) -> None:
        """End in good order."""
        self.ledger.flush(force=True)
        if not self._phases:
            self.drive.choose_again()
        self.leave()

    def take(self, *, spoiled: bool) -> bool:
        """Hand out the next unit; returns whether there is one to hand out, or to wait for."""
        taken = self._next()
        if taken is None:
            return bool(self.attempts)
        unit, number = taken
        try:
            writes, receipt = self.world.replica.prepare(unit, spoiled=spoiled)
        except Exception as error:
            self._give_up(unit, number, f"{type(error).__name__}: {error}")
        else:
            self.attempts.append(Attempt(unit, number, writes, receipt, spoiled and receipt.failed > 0))
        return True

    def copy(self, attempt: Attempt) -> None:
        """Let another replica run an attempt as well, unless it cannot: nobody minds a copy that fails."""
        with suppress(ValueError):
            writes, receipt = self.world.replica.prepare(attempt.unit)
            self.attempts.append(Attempt(attempt.unit, attempt.number, writes, receipt))

    def receive(self, attempt: Attempt) -> list[Attempt]:
        """Receive the receipt of an attempt; returns its copies, which nobody waits for any more."""
        others = [a for a in self.attempts if a.unit == attempt.unit and a is not attempt]
        self.attempts = [a for a in self.attempts if a.unit != attempt.unit]
        self.memory[attempt.key] = FAILED if attempt.receipt.failed else DONE
        self.drive._on_event(
            UnitDone(unit=attempt.unit.id, replica=0, attempt=attempt.number, seconds=1.0, receipt=attempt.receipt)
        )
        return others

    def fail(self, attempt: Attempt, error: str) -> None:
        """Hear that an attempt has failed, which its copies may still make good."""
        self.attempts.remove(attempt)
        if all(other.unit != attempt.unit for other in self.attempts):
            self._give_up(attempt.unit, attempt.number, error)

    def lose(self, attempt: Attempt) -> None:
        """Hear that the replica of an attempt has died."""
        self.drive._on_event(ReplicaLost(replica=0, error="it died", again_in_s=1.0))
        self.fail(attempt, "its replica died")

    def _give_up(self, unit: Unit, number: int, error: str) -> None:
        if number < MAX_ATTEMPTS:
            self._again.append((unit, number + 1))
            self.drive._on_event(UnitRetried(unit=unit.id, replica=0, attempt=number, error=error))
        else:
            self.memory[unit.group, unit.index] = FAILED
            self.drive._on_event(UnitFailed(unit=unit.id, attempts=number, error=error))

    def _next(self) -> tuple[Unit, int] | None:
        """Return the next unit and the number of its attempt, as ``_Drive.all`` and a pool would."""
        while self._phases:
            if self._queue is None and self.drive._may_start(self._phases[0]):
                self._queue = self.drive.due(self._phases[0])
            if self._queue is not None and (unit := next(self._queue, None)) is not None:
                return unit, 1
            if self._again:
                return self._again.pop(0)
            if self.attempts:
                return None
            self._queue = None
            self._phases.pop(0)
        return None

    def told(self) -> dict[UnitKey, int]:
        """Return what its ledger says of every unit."""
        status: Any = self.ledger._status
        return {(group, index): int(state) for group, values in status.items() for index, state in enumerate(values)}
