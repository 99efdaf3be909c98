"""The loop of a pool: hand out units, hear answers, survive losses; over any backend."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from itertools import count

from cluster.backend import Answer, Backend, BuildFailed, Built, Died, Finished, Leaving, Placed
from cluster.dispatch import Dispatcher, Lease
from cluster.events import Callback
from cluster.fleet import Fleet
from cluster.options import PoolOptions
from cluster.work import PoolHaltedError, Stop, WorkUnit, never

_POLL_S = 1.0
"""How often a reason to stop, and room for a replica, are asked for while nothing is answered."""


class Pool:
    """Runs units on the replicas of a backend, keeping them between runs until ``close``.

    An exception that leaves ``run``, an interrupt included, closes the pool first.

    Parameters
    ----------
    backend : makes and kills replicas. options : size and patience. clock : seconds, the backend's own.
    """

    def __init__(self, backend: Backend, options: PoolOptions, clock: Callable[[], float] = time.monotonic) -> None:
        if options.replicas < 1:
            raise ValueError("A pool needs replicas: 0 were asked for. Use 1 or more, or the in-process pool.")
        self._backend, self._options, self._clock = backend, options, clock
        self._fleet = Fleet(backend, options, clock)
        self._tickets = count()

    def run(self, units: Iterable[WorkUnit], on_event: Callback, stop: Stop = never) -> bool:
        """Run all units, reporting each as done or failed once; see ``Executor.run``.

        Raises
        ------
        PoolError : the backend is not connected, no node can hold a replica, or no replica is left.
        ReplicaStartError : no replica came up: the factory raised or killed too often, or took too long.
        PoolHaltedError : a worker met something that would meet every unit.
        """
        dispatcher = Dispatcher(units, self._options, on_event, self._clock)
        if dispatcher.finished:
            return True
        run = _Run(self._backend, self._options, self._clock, self._fleet, dispatcher, on_event, self._tickets)
        try:
            self._backend.open()
            self._fleet.begin()
            run.welcome()
            run.loop(stop)
        except BaseException:
            self.close()
            raise
        if dispatcher.finished:
            run.part_with_losers()
        else:
            self.close()
        return dispatcher.finished

    def close(self) -> None:
        """Kill the replicas of this pool, and nothing else; a later run starts new ones."""
        self._backend.close()
        self._fleet.close()


class _Run:
    """One run of a pool: what is asked of the replicas and what their answers mean."""

    def __init__(
        self,
        backend: Backend,
        options: PoolOptions,
        clock: Callable[[], float],
        fleet: Fleet,
        dispatcher: Dispatcher,
        on_event: Callback,
        tickets: count[int],
    ) -> None:
        self._backend, self._options, self._clock = backend, options, clock
        self._fleet, self._dispatcher, self._on_event, self._tickets = fleet, dispatcher, on_event, tickets
        self._calls: dict[int, Lease] = {}
        self._drain_until = math.inf
        self._halted: str | None = None
        self._ask_at = -math.inf
        self._kept_up_at = -math.inf

    def welcome(self) -> None:
        """Count in the replicas that an earlier run has left."""
        for slot in self._fleet.up:
            slot.idle_since = self._clock()
            self._dispatcher.join(slot.index, slot.hardware)

    def loop(self, stop: Stop) -> None:
        """Go on until every unit has ended, or the run is stopped and nothing is running any more."""
        while not self._dispatcher.finished:
            if self._drain_until == math.inf and (self._halted is not None or self._told_to(stop)):
                self._drain_until = self._clock() + self._options.drain_s
                self._dispatcher.drain(self._options.drain_s)
            if self._dispatcher.drained or self._clock() >= self._drain_until:
                break
            self._keep_up()
            self._hand_out()
            self._listen(self._patience())
        if self._halted is not None and not self._dispatcher.finished:
            raise PoolHaltedError(self._halted)

    def part_with_losers(self) -> None:
        """End replicas that still run a unit of which a copy was faster: the next run must not wait behind it."""
        for slot in self._fleet.up:
            if self._dispatcher.holds(slot.index):
                self._fleet.release(slot.index, "a copy of its unit was faster", self._on_event)

    def _told_to(self, stop: Stop) -> bool:
        now = self._clock()
        if now < self._ask_at:
            return False
        self._ask_at = now + _POLL_S
        return stop() is not None

    def _listen(self, timeout_s: float) -> None:
        for answer in self._backend.wait(timeout_s):
            # What was answered before the replica was ended, by an answer ahead of this one, no longer counts.
            if self._fleet.alive(answer.replica):
                self._hear(answer)

    def _keep_up(self) -> None:
        self._kept_up_at = self._clock()
        if self._dispatcher.overdue() or self._fleet.late():
            # The answer may be there already, if it was this process that had no time.
            self._listen(0.0)
        for replica in self._dispatcher.overdue():
            error = f"the unit ran longer than its lease of {self._options.lease_s:g} s; the replica counts as hung"
            self._lose(replica, error)
        self._fleet.expire_builds(self._on_event)
        for replica in self._fleet.release_idle(self._on_event):
            self._dispatcher.withdraw(replica, "idle")
        if self._drain_until == math.inf:
            self._fleet.resize(self._dispatcher.demand, self._on_event)

    def _hand_out(self) -> None:
        """Send units one by one around the replicas, so that none fills its window before another has work."""
        hungry = self._fleet.up
        while hungry:
            hungry = [slot for slot in hungry if self._send(slot.index, self._dispatcher.take(slot.index))]
        content: set[str] = set()
        for slot in self._fleet.up:
            if self._dispatcher.holds(slot.index):
                continue
            # What does not straggle for one idle replica does not for another of the same hardware either.
            if slot.hardware not in content and self._send(slot.index, self._dispatcher.copy(slot.index)):
                continue
            content.add(slot.hardware)
            slot.idle_since = self._clock() if slot.idle_since is None else slot.idle_since

    def _send(self, replica: int, lease: Lease | None) -> bool:
        if lease is None:
            return False
        self._fleet.slot(replica).idle_since = None
        ticket = next(self._tickets)
        self._calls[ticket] = lease
        self._backend.send(replica, ticket, lease.unit.payload)
        return True

    def _patience(self) -> float:
        idle = {slot.hardware: slot.index for slot in self._fleet.up if not self._dispatcher.holds(slot.index)}
        copies = map(self._dispatcher.copy_due, idle.values())
        nearest = min(
            self._fleet.next_due(self._kept_up_at),
            self._dispatcher.next_overdue(),
            self._drain_until,
            min((due[0] for due in copies if due is not None), default=math.inf),
        )
        return min(_POLL_S, max(0.0, nearest - self._clock()))

    def _hear(self, answer: Answer) -> None:
        match answer:
            case Finished(replica=replica, ticket=ticket, outcome=outcome):
                self._finish(replica, self._calls.pop(ticket, None), answer)
                if outcome.halts:
                    self._halted = self._halted or outcome.error
            case Placed(replica=replica):
                self._fleet.placed(replica)
            case Built(replica=replica, hardware=hardware):
                self._fleet.built(replica, hardware, self._on_event)
                self._dispatcher.join(replica, hardware)
            case BuildFailed(replica=replica, error=error):
                self._fleet.build_failed(replica, error, self._on_event)
            case Leaving(replica=replica, reason=reason):
                self._fleet.slot(replica).leaving = reason
                self._let_go(replica)
            case Died(replica=replica, error=error):
                self._lose(replica, error)

    def _finish(self, replica: int, lease: Lease | None, answer: Finished) -> None:
        # None for a unit of an earlier run that had ended elsewhere.
        if lease is not None:
            self._dispatcher.settle(lease, answer.outcome)
            if answer.outcome.error is None and not answer.outcome.refused:
                self._fleet.finished_unit(replica)
        self._let_go(replica)

    def _let_go(self, replica: int) -> None:
        """End a replica that is about to go, once it has nothing to finish."""
        if self._fleet.slot(replica).leaving is not None and not self._dispatcher.holds(replica):
            reason = self._fleet.slot(replica).leaving or ""
            self._dispatcher.withdraw(replica, reason)
            self._fleet.release(replica, reason, self._on_event, shun_node=True)

    def _lose(self, replica: int, error: str) -> None:
        for ticket in [ticket for ticket, lease in self._calls.items() if lease.replica == replica]:
            del self._calls[ticket]
        charged = self._dispatcher.lose(replica, error)
        self._fleet.died(replica, error, charged, self._on_event)
