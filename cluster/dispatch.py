"""Which unit goes to which replica: windows, locality, attempts, leases and copies, without process or Ray."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median

from cluster.backlog import Backlog, Waiting
from cluster.events import Callback, PoolDraining, UnitDone, UnitFailed, UnitRetried, UnitStarted
from cluster.options import PoolOptions
from cluster.work import Outcome, WorkUnit

_WINDOWS_OF_LOOK_AHEAD = 4
_PACES_KEPT = 101
_PACES_NEEDED = 5
_LEAST_STRAGGLE_S = 0.5
_UNITS_OF_PATIENCE = 3
_NOWHERE = object()
_NEVER = float("inf")


@dataclass(slots=True, eq=False)
class Lease:
    """One unit in the window of one replica; ends when the unit finishes, fails, is lost or outlives the lease.

    Attributes
    ----------
    arrival : position of the unit in the order in which units were pulled.
    alone : whether no other unit may share the window.
    attempt : number of the attempt, from 1; 0 while the unit only waits in the window.
    began : time at which the unit came first in its window.
    copy : whether another replica holds the unit as well, and did so before.
    void : whether the unit has ended elsewhere, so that the answer no longer matters.
    """

    unit: WorkUnit
    arrival: int
    replica: int
    alone: bool
    attempt: int = 0
    began: float = _NEVER
    copy: bool = False
    void: bool = False


class Dispatcher:
    """Decides what each replica runs next and reports the fate of every unit.

    Replicas run the units of their window in the order in which they took them. Only the first of them has started,
    so only that one is charged with an attempt when the replica dies; the others go back to the queue unharmed.
    As the answer of a finished unit can be lost when the next one kills the process at once, the charge may hit the
    wrong one: all units of a lost window run alone from then on, so no unit pays twice for another. A unit that was
    charged goes to another replica if one comes free in the time that a unit takes, so that a bad replica does not use
    up the attempts of a good unit. One that took its replica along waits behind all units pulled before: a replica
    that kills whatever it gets is known by more than ``max_restarts`` different units before any of them comes twice.

    Parameters
    ----------
    units : pulled only as far as the look-ahead: for each replica four full windows, or as many as it may be lost for.
    options : number of replicas, size of a window, attempts for each unit, length of a lease.
    on_event : observer of the units.
    clock : seconds, for leases and stragglers.
    """

    def __init__(
        self,
        units: Iterable[WorkUnit],
        options: PoolOptions,
        on_event: Callback,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source: Iterator[WorkUnit] | None = iter(units)
        self._options, self._on_event, self._clock = options, on_event, clock
        ahead = max(_WINDOWS_OF_LOOK_AHEAD * options.in_flight, options.max_restarts + 1)
        self._look_ahead = max(options.replicas, 1) * ahead
        self._arrivals = 0
        self._backlog = Backlog()
        self._windows: dict[int, deque[Lease]] = {}
        self._hardware: dict[int, str] = {}
        self._localities: dict[int, Hashable] = {}
        self._served: Counter[Hashable] = Counter()
        self._attempts: dict[int, int] = {}
        # None once a copy has failed: it stays the only one of its attempt.
        self._copies: dict[int, Lease | None] = {}
        self._paces: deque[float] = deque(maxlen=_PACES_KEPT)
        self._draining = False
        self._refill()

    @property
    def finished(self) -> bool:
        """Whether every unit is done or failed."""
        return self._source is None and not self._attempts

    @property
    def drained(self) -> bool:
        """Whether the run is being stopped and no started unit is left."""
        return self._draining and not any(lease.attempt and not lease.void for lease in self._leases())

    @property
    def demand(self) -> int:
        """How many replicas could have a unit now: those that hold one, and one for each unit that nobody holds."""
        return len(self._backlog) + sum(1 for window in self._windows.values() if window)

    def join(self, replica: int, hardware: str = "") -> None:
        """Count a replica in, before it takes anything."""
        self._windows.setdefault(replica, deque())
        self._hardware[replica] = hardware

    def holds(self, replica: int) -> bool:
        """Whether a replica has something in its window."""
        return bool(self._windows.get(replica))

    def take(self, replica: int) -> Lease | None:
        """Put the best next unit into the window of a replica; None when there is nothing for it now."""
        window = self._windows.setdefault(replica, deque())
        if self._draining or not self._backlog or len(window) >= self._options.in_flight:
            return None
        # The last units must not wait behind a busy replica while another one falls idle.
        if window and (window[0].alone or len(self._backlog) <= max(self._options.replicas, 1)):
            return None
        waiting = self._backlog.pop(
            self._localities.get(replica, _NOWHERE), self._served, lambda each: self._accepts(replica, each)
        )
        if waiting is None:
            return None
        self._serve(replica, waiting.unit.locality)
        lease = Lease(waiting.unit, waiting.arrival, replica, waiting.alone)
        window.append(lease)
        self._start_first(replica)
        self._refill()
        return lease

    def copy(self, replica: int) -> Lease | None:
        """Give an idle replica a second copy of the worst straggler; None while nothing straggles."""
        due = self.copy_due(replica)
        if due is None or due[0] > self._clock():
            return None
        original = due[1]
        lease = Lease(original.unit, original.arrival, replica, alone=True, copy=True)
        lease.attempt, lease.began = original.attempt, self._clock()
        self._copies[original.unit.id] = lease
        self._windows[replica].append(lease)
        self._on_event(UnitStarted(unit=lease.unit.id, replica=replica, attempt=lease.attempt, copy=True))
        return lease

    def copy_due(self, replica: int) -> tuple[float, Lease] | None:
        """Return when the next unit counts as a straggler that this idle replica may copy, and its lease."""
        factor = self._options.straggler_factor
        spare = self._source is None and not self._backlog and not self._draining and not self.holds(replica)
        if not factor or not spare or len(self._paces) < _PACES_NEEDED or replica not in self._windows:
            return None
        pace, hardware = factor * median(self._paces), self._hardware.get(replica, "")
        due = [
            (lease.began + max(_LEAST_STRAGGLE_S, pace * lease.unit.weight), lease)
            for lease in self._leases()
            if lease.attempt and not lease.copy and not lease.void and lease.unit.id not in self._copies
            if self._hardware.get(lease.replica, "") == hardware
        ]
        return min(due, key=lambda entry: (entry[0], entry[1].arrival), default=None)

    def settle(self, lease: Lease, outcome: Outcome) -> None:
        """End a lease by the outcome of its attempt; a lease that has ended before is ignored."""
        if not self._withdraw(lease):
            return
        if not lease.void:
            if outcome.error is None and not outcome.refused:
                self._finish(lease, outcome)
            elif lease.copy:
                self._end_copy(lease, failed=not (outcome.refused or outcome.halts))
            elif self._promote(lease):
                pass
            elif outcome.refused or outcome.halts:
                # A refusal may be due to the units that were sent with it.
                lease.alone = lease.alone or outcome.refused
                self._give_back(lease, outcome.error or "its replica is about to go")
            else:
                self._retry_or_fail(lease, outcome.error or "")
        self._start_first(lease.replica)
        self._refill()

    def lose(self, replica: int, error: str) -> list[int]:
        """Take everything back from a replica that is gone: its running unit was tried, the waiting ones were not.

        Returns
        -------
        The ids of the units that were charged with an attempt.
        """
        return self._abandon(replica, error, charge=True)

    def withdraw(self, replica: int, reason: str) -> None:
        """Take everything back from a replica that is ended on purpose; nothing of it counts as an attempt."""
        self._abandon(replica, reason, charge=False)

    def overdue(self) -> list[int]:
        """Return the replicas whose running unit has outlived its lease."""
        now = self._clock()
        return [w[0].replica for w in self._windows.values() if w and now >= w[0].began + self._options.lease_s]

    def next_overdue(self) -> float:
        """Return the time at which the next lease ends if nothing happens before; infinity without a lease."""
        return min((w[0].began for w in self._windows.values() if w), default=_NEVER) + self._options.lease_s

    def drain(self, limit_s: float) -> None:
        """Hand out nothing any more; what has started may finish."""
        if not self._draining:
            self._draining = True
            running = sum(1 for lease in self._leases() if lease.attempt and not lease.void and not lease.copy)
            self._on_event(PoolDraining(units=running, limit_s=limit_s))

    def _accepts(self, replica: int, waiting: Waiting) -> bool:
        if waiting.alone and self._windows[replica]:
            return False
        return waiting.avoid != replica or len(self._windows) < 2 or waiting.avoid_until <= self._clock()

    def _serve(self, replica: int, locality: Hashable) -> None:
        self._forget(replica)
        self._localities[replica] = locality
        self._served[locality] += 1

    def _forget(self, replica: int) -> None:
        if replica in self._localities:
            served = self._localities.pop(replica)
            self._served[served] -= 1
            if not self._served[served]:
                del self._served[served]

    def _leases(self) -> Iterator[Lease]:
        return (lease for window in self._windows.values() for lease in window)

    def _start_first(self, replica: int) -> None:
        if (window := self._windows.get(replica)) and not self._draining:
            self._start(window[0])

    def _start(self, lease: Lease) -> None:
        if lease.attempt or lease.void:
            return
        self._attempts[lease.unit.id] += 1
        lease.attempt, lease.began = self._attempts[lease.unit.id], self._clock()
        self._on_event(UnitStarted(unit=lease.unit.id, replica=lease.replica, attempt=lease.attempt))

    def _withdraw(self, lease: Lease) -> bool:
        window = self._windows.get(lease.replica)
        if window is None or lease not in window:
            return False
        # An answer proves a start, even when the one before it has not been heard of yet.
        self._start(lease)
        window.remove(lease)
        return True

    def _finish(self, lease: Lease, outcome: Outcome) -> None:
        unit = lease.unit
        del self._attempts[unit.id]
        if self._copies.pop(unit.id, None) is not None:
            for other in self._leases():
                other.void = other.void or other.unit.id == unit.id
        if unit.weight > 0:
            self._paces.append(outcome.seconds / unit.weight)
        self._on_event(
            UnitDone(
                unit=unit.id,
                replica=lease.replica,
                attempt=lease.attempt,
                seconds=outcome.seconds,
                receipt=outcome.receipt,
            )
        )

    def _abandon(self, replica: int, error: str, *, charge: bool) -> list[int]:
        leases = self._windows.pop(replica, deque())
        self._forget(replica)
        self._hardware.pop(replica, None)
        charged: list[int] = []
        for lease in leases:
            lease.alone = lease.alone or charge
            if lease.void:
                continue
            if lease.copy:
                self._end_copy(lease, failed=charge)
            elif self._promote(lease):
                continue
            elif lease.attempt and charge:
                charged.append(lease.unit.id)
                lease.arrival = self._next_arrival()
                self._retry_or_fail(lease, error)
            elif lease.attempt:
                self._give_back(lease, error)
            else:
                self._requeue(lease)
        self._refill()
        return charged

    def _give_back(self, lease: Lease, reason: str) -> None:
        """Requeue a started unit without charging it."""
        self._on_event(
            UnitRetried(
                unit=lease.unit.id, replica=lease.replica, attempt=lease.attempt, error=f"not charged: {reason}"
            )
        )
        self._attempts[lease.unit.id] -= 1
        self._requeue(lease)

    def _retry_or_fail(self, lease: Lease, error: str) -> None:
        unit = lease.unit.id
        if lease.attempt < self._options.max_attempts:
            self._on_event(UnitRetried(unit=unit, replica=lease.replica, attempt=lease.attempt, error=error))
            self._requeue(lease, avoid=lease.replica)
        else:
            del self._attempts[unit]
            self._on_event(UnitFailed(unit=unit, attempts=lease.attempt, error=error))

    def _end_copy(self, copy: Lease, *, failed: bool) -> None:
        """Go on with the original alone; what failed once is not copied again and again while the original runs."""
        if failed:
            self._copies[copy.unit.id] = None
        else:
            del self._copies[copy.unit.id]

    def _promote(self, lease: Lease) -> bool:
        """Let the copy of a unit, if there is one, stand for the attempt from now on."""
        copy = self._copies.pop(lease.unit.id, None)
        if copy is not None:
            copy.copy = False
        return copy is not None

    def _requeue(self, lease: Lease, avoid: int | None = None) -> None:
        until = self._clock() + self._time_of_a_unit()
        self._backlog.add(Waiting(lease.unit, lease.arrival, lease.alone, avoid, until))

    def _time_of_a_unit(self) -> float:
        """Return seconds in which a replica that runs a unit should come free; the lease while nothing is known."""
        if len(self._paces) < _PACES_NEEDED:
            return self._options.lease_s
        heaviest = max((lease.unit.weight for lease in self._leases()), default=1.0)
        return max(_LEAST_STRAGGLE_S, _UNITS_OF_PATIENCE * heaviest * median(self._paces))

    def _next_arrival(self) -> int:
        self._arrivals += 1
        return self._arrivals - 1

    def _refill(self) -> None:
        while self._source is not None and not self._draining and len(self._backlog) < self._look_ahead:
            unit = next(self._source, None)
            if unit is None:
                self._source = None
            elif unit.id in self._attempts:
                raise ValueError(f"Two units share an id: {unit.id}. Give every unit of a run its own.")
            else:
                self._attempts[unit.id] = 0
                self._backlog.add(Waiting(unit, self._next_arrival()))
