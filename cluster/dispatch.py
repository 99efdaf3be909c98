"""Which unit goes to which replica: windows, locality, attempts and requeueing, without clock, process or Ray."""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from cluster.events import Callback, ReplicaLost, UnitDone, UnitFailed, UnitRetried, UnitStarted

_ERROR_CHARACTERS = 500
_WINDOWS_OF_LOOK_AHEAD = 4
_NOWHERE = object()
_LEAST_OPTIONS = {
    "replicas": 0,
    "cpus_per_replica": 0,
    "gpus_per_replica": 0,
    "in_flight": 1,
    "max_attempts": 1,
    "max_restarts": 0,
    "start_timeout_s": 0,
}


class PoolError(RuntimeError):
    """The pool cannot run its units; the ones that it reported done stay done."""


class ReplicaStartError(PoolError):
    """A replica could not be constructed."""


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A piece of work that may run more than once with the same outcome.

    Attributes
    ----------
    id : name of the unit in events; unique within a run.
    locality : units of equal locality share state worth keeping in a replica, such as a recorded run.
    payload : what the worker gets; small, as it is sent to the replica.
    """

    id: int
    locality: Hashable
    payload: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """Size and patience of a pool.

    Attributes
    ----------
    replicas : worker processes; 0 means none, for the in-process pool.
    cpus_per_replica, gpus_per_replica : resources reserved for each of them.
    in_flight : units a replica holds at once: one running, the others waiting.
    max_attempts : times a unit is tried before it counts as failed, and times a factory is called in a row.
    max_restarts : times the process of one replica may die and come back.
    start_timeout_s : seconds a replica may take from request to constructed worker.
    """

    replicas: int = 1
    cpus_per_replica: float = 1
    gpus_per_replica: float = 0
    in_flight: int = 2
    max_attempts: int = 3
    max_restarts: int = 3
    start_timeout_s: float = 300

    def __post_init__(self) -> None:
        for name, least in _LEAST_OPTIONS.items():
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(f"PoolOptions.{name} is too small: {value!r}. Use {least} or more.")


class Worker(Protocol):
    """The state of one replica, built once in its process."""

    def run(self, payload: Any) -> Any:
        """Do the unit and return a small receipt of it."""


Factory: TypeAlias = Callable[[], Worker]


class Executor(Protocol):
    """Runs units at least once each and reports every one as done or failed exactly once."""

    def run(self, units: Iterable[WorkUnit], on_event: Callback) -> None:
        """Run all units, pulling them from the iterable as they are needed."""

    def close(self) -> None:
        """Give up the replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one attempt: a receipt, or the text of an error."""

    seconds: float
    receipt: Any = None
    error: str | None = None


def describe_error(error: BaseException) -> str:
    """Return the type and text of an error in one line of limited length."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if len(line) <= _ERROR_CHARACTERS:
        return line
    # A text that quotes a traceback has its point at the end.
    half = _ERROR_CHARACTERS // 2
    return f"{line[: half - 5]} ... {line[-half:]}"


def start_failure(replica: int, error: str, attempts: int = 1) -> str:
    """Return the message for a replica that does not start."""
    tried = f" (tried {attempts} times)" if attempts > 1 else ""
    return f"Replica {replica} cannot start{tried}: {error}. Repair the cause and run again."


def attempt_unit(worker: Worker, payload: Any) -> Outcome:
    """Run a payload and turn whatever the worker raises into an outcome.

    ``SystemExit`` counts as an error of the unit: a library that calls ``sys.exit`` must not take a replica along.
    """
    began = time.perf_counter()
    try:
        receipt = worker.run(payload)
    except (Exception, SystemExit) as error:
        return Outcome(seconds=time.perf_counter() - began, error=describe_error(error))
    return Outcome(seconds=time.perf_counter() - began, receipt=receipt)


@dataclass(slots=True, eq=False)
class Lease:
    """One unit in the window of one replica; ends when the unit finishes, fails or is lost.

    Attributes
    ----------
    arrival : position of the unit in the order in which units were pulled.
    alone : whether no other unit may share the window.
    attempt : number of the attempt, from 1; 0 while the unit only waits in the window.
    """

    unit: WorkUnit
    arrival: int
    replica: int
    alone: bool
    attempt: int = 0


@dataclass(slots=True, eq=False)
class _Pending:
    unit: WorkUnit
    arrival: int
    alone: bool = False


class Dispatcher:
    """Decides what each replica runs next and reports the fate of every unit.

    Replicas run the units of their window in the order in which they took them. Only the first of them has started,
    so only that one is charged with an attempt when the replica dies; the others go back to the queue unharmed.
    As the answer of a finished unit can be lost when the next one kills the process at once, the charge may hit the
    wrong one: all units of a lost window run alone from then on, so no unit pays twice for another.

    Parameters
    ----------
    units : pulled only as far as the look-ahead of four full windows of all replicas.
    options : number of replicas, size of a window, attempts for each unit.
    on_event : observer of the units; also of lost replicas.
    """

    def __init__(self, units: Iterable[WorkUnit], options: PoolOptions, on_event: Callback) -> None:
        self._source: Iterator[WorkUnit] | None = iter(units)
        self._options = options
        self._on_event = on_event
        self._replicas = max(options.replicas, 1)
        self._look_ahead = _WINDOWS_OF_LOOK_AHEAD * self._replicas * options.in_flight
        self._arrivals = 0
        self._pending: list[_Pending] = []
        self._windows: dict[int, deque[Lease]] = {}
        self._localities: dict[int, Hashable] = {}
        self._attempts: dict[int, int] = {}
        self._refill()

    @property
    def finished(self) -> bool:
        """Whether every unit is done or failed."""
        return self._source is None and not self._attempts

    def take(self, replica: int) -> Lease | None:
        """Put the best next unit into the window of a replica; None when there is nothing for it now."""
        window = self._windows.setdefault(replica, deque())
        if not self._pending or len(window) >= self._options.in_flight:
            return None
        # The last units must not wait behind a busy replica while another one falls idle.
        if window and (window[0].alone or len(self._pending) <= self._replicas):
            return None
        pending = self._choose(replica, [each for each in self._pending if not (window and each.alone)])
        if pending is None:
            return None
        self._pending.remove(pending)
        self._localities[replica] = pending.unit.locality
        lease = Lease(pending.unit, pending.arrival, replica, pending.alone)
        window.append(lease)
        self._start_first(replica)
        self._refill()
        return lease

    def settle(self, lease: Lease, outcome: Outcome) -> None:
        """End a lease by the outcome of its attempt; a lease that has ended before is ignored."""
        if not self._withdraw(lease):
            return
        if outcome.error is None:
            del self._attempts[lease.unit.id]
            self._on_event(
                UnitDone(
                    unit=lease.unit.id,
                    replica=lease.replica,
                    attempt=lease.attempt,
                    seconds=outcome.seconds,
                    receipt=outcome.receipt,
                )
            )
        else:
            self._retry_or_fail(lease, outcome.error)
        self._start_first(lease.replica)
        self._refill()

    def lose(self, replica: int, error: str) -> None:
        """Take everything back from a replica that died: its running unit was tried, the waiting ones were not."""
        leases = self._windows.pop(replica, deque())
        self._localities.pop(replica, None)
        self._on_event(ReplicaLost(replica=replica, error=error))
        for lease in leases:
            lease.alone = True
            if lease.attempt:
                self._retry_or_fail(lease, error)
            else:
                self._requeue(lease)
        self._refill()

    def _choose(self, replica: int, candidates: list[_Pending]) -> _Pending | None:
        own = self._localities.get(replica, _NOWHERE)
        others = {locality for owner, locality in self._localities.items() if owner != replica}
        free: _Pending | None = None
        for pending in candidates:
            if pending.unit.locality == own:
                return pending
            if free is None and pending.unit.locality not in others:
                free = pending
        return free or (candidates[0] if candidates else None)

    def _start_first(self, replica: int) -> None:
        if window := self._windows.get(replica):
            self._start(window[0])

    def _start(self, lease: Lease) -> None:
        if lease.attempt:
            return
        self._attempts[lease.unit.id] += 1
        lease.attempt = self._attempts[lease.unit.id]
        self._on_event(UnitStarted(unit=lease.unit.id, replica=lease.replica, attempt=lease.attempt))

    def _withdraw(self, lease: Lease) -> bool:
        window = self._windows.get(lease.replica)
        if window is None or lease not in window:
            return False
        # An answer proves a start, even when the one before it has not been heard of yet.
        self._start(lease)
        window.remove(lease)
        return True

    def _retry_or_fail(self, lease: Lease, error: str) -> None:
        if lease.attempt < self._options.max_attempts:
            self._requeue(lease)
            event = UnitRetried(unit=lease.unit.id, replica=lease.replica, attempt=lease.attempt, error=error)
            self._on_event(event)
        else:
            del self._attempts[lease.unit.id]
            self._on_event(UnitFailed(unit=lease.unit.id, attempts=lease.attempt, error=error))

    def _requeue(self, lease: Lease) -> None:
        insort(self._pending, _Pending(lease.unit, lease.arrival, lease.alone), key=lambda pending: pending.arrival)

    def _refill(self) -> None:
        while self._source is not None and len(self._pending) < self._look_ahead:
            unit = next(self._source, None)
            if unit is None:
                self._source = None
            elif unit.id in self._attempts:
                raise ValueError(f"Two units share an id: {unit.id}. Give every unit of a run its own.")
            else:
                self._attempts[unit.id] = 0
                self._pending.append(_Pending(unit, self._arrivals))
                self._arrivals += 1
