"""The replicas of a pool over time: asked for, placed, built, lost, started again later, released, given up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from cluster.backend import Backend
from cluster.events import Callback, PoolWaiting, ReplicaLost, ReplicaReleased, ReplicaStarted
from cluster.options import PoolOptions
from cluster.work import PoolError, ReplicaStartError, start_failure

_STANDBY = 1
"""Idle replicas that stay while others work, to copy what straggles."""
_TELL_AFTER_S = 5.0
"""Without a place for so long, observers are told, and again whenever the time has doubled: any start takes seconds."""


class State(StrEnum):
    """Where a replica is in its life."""

    ABSENT = "absent"
    PLACING = "placing"
    BUILDING = "building"
    UP = "up"
    GIVEN_UP = "given up"


_ALIVE = (State.PLACING, State.BUILDING, State.UP)


@dataclass(slots=True, eq=False)
class Slot:
    """One replica, in all the processes that it has had.

    Attributes
    ----------
    due : when an absent one may be asked for again. deadline : when building must have ended.
    losses : processes lost in a row without a finished unit. failures : times in a row that the factory raised.
    idle_since : since when it has had nothing to do. leaving : why it gets no more units.
    hardware : what its worker says that it runs on.
    """

    index: int
    state: State = State.ABSENT
    due: float = -math.inf
    deadline: float = math.inf
    losses: int = 0
    failures: int = 0
    idle_since: float | None = None
    leaving: str | None = None
    hardware: str = ""


class Fleet:
    """Keeps as many replicas alive as there is work for, and decides which losses can be survived.

    A replica that is lost starts again after a pause that doubles. It is given up when it is lost too often in a row
    while others live; the last one only if it never got as far as a unit, or if more different units than
    ``max_restarts`` took it down in a row: then the fault is not that of a unit.
    """

    def __init__(self, backend: Backend, options: PoolOptions, clock: Callable[[], float]) -> None:
        self._backend, self._options, self._clock = backend, options, clock
        self._slots = [Slot(index) for index in range(options.replicas)]
        self._ever_built = False
        self._charged: set[int] = set()
        self._last_error = ""
        self._homeless_since: float | None = None
        self._tell_after = _TELL_AFTER_S

    @property
    def up(self) -> list[Slot]:
        """Replicas that take units."""
        return [slot for slot in self._slots if slot.state is State.UP and slot.leaving is None]

    def slot(self, replica: int) -> Slot:
        """Return a replica by its number."""
        return self._slots[replica]

    def alive(self, replica: int) -> bool:
        """Whether a replica has been asked for and not been ended since."""
        return self._slots[replica].state in _ALIVE

    def begin(self) -> None:
        """Start a run: what was given up in an earlier one gets another chance."""
        self._homeless_since = None
        for slot in self._slots:
            if slot.state is State.GIVEN_UP:
                slot.state = State.ABSENT
            slot.due, slot.losses, slot.failures, slot.idle_since = -math.inf, 0, 0, None
        self._charged.clear()

    def resize(self, demand: int, on_event: Callback) -> None:
        """Ask for replicas up to the demand, and withdraw requests that would come too late to be of use."""
        wanted = min(self._options.replicas, demand)
        alive = [slot for slot in self._slots if slot.state in _ALIVE and slot.leaving is None]
        for slot in self._slots:
            if len(alive) < wanted and slot.state is State.ABSENT and slot.due <= self._clock():
                slot.state, slot.leaving, slot.idle_since = State.PLACING, None, None
                self._backend.spawn(slot.index)
                alive.append(slot)
        for slot in [slot for slot in reversed(alive) if slot.state is State.PLACING][: max(0, len(alive) - wanted)]:
            self._end(slot)
        self._require_place(on_event)
        self._require_replicas()

    def placed(self, replica: int) -> None:
        """Take note of a place: from now on the worker must be built in time."""
        slot = self._slots[replica]
        if slot.state is State.PLACING:
            slot.state, slot.deadline = State.BUILDING, self._clock() + self._options.start_timeout_s

    def built(self, replica: int, hardware: str, on_event: Callback) -> None:
        """Take note of a worker."""
        slot = self._slots[replica]
        slot.state, slot.deadline, slot.failures = State.UP, math.inf, 0
        slot.idle_since, slot.hardware, self._ever_built = self._clock(), hardware, True
        on_event(ReplicaStarted(replica=replica, hardware=hardware))

    def build_failed(self, replica: int, error: str, on_event: Callback) -> None:
        """End a replica whose factory raised; it tries again a few times.

        Raises
        ------
        ReplicaStartError : that was the last time, and no replica of this pool ever had a worker.
        """
        slot = self._slots[replica]
        slot.failures += 1
        last = slot.failures >= self._options.max_attempts
        self._lost(slot, error, give_up=last, tries=slot.failures, on_event=on_event)

    def died(self, replica: int, error: str, charged: list[int], on_event: Callback) -> None:
        """Take note of a dead process.

        Parameters
        ----------
        charged : units that were running in it.

        Raises
        ------
        ReplicaStartError : it died once too often, and no replica of this pool ever had a worker.
        """
        slot = self._slots[replica]
        slot.losses += 1
        self._charged.update(charged)
        too_often = slot.losses > self._options.max_restarts
        alone = not any(other.state is State.UP for other in self._slots if other is not slot)
        spared = alone and bool(charged) and len(self._charged) <= self._options.max_restarts
        self._lost(slot, error, give_up=too_often and not spared, tries=slot.losses, on_event=on_event)

    def finished_unit(self, replica: int) -> None:
        """Take note that a replica works: its losses are no longer in a row."""
        self._slots[replica].losses = 0
        self._charged.clear()

    def late(self) -> list[int]:
        """Return the replicas whose worker is not built in time."""
        now = self._clock()
        return [slot.index for slot in self._slots if slot.state is State.BUILDING and slot.deadline <= now]

    def expire_builds(self, on_event: Callback) -> None:
        """End replicas whose worker is not built in time; they try again only if another one has built its own.

        Raises
        ------
        ReplicaStartError : no replica of this pool ever had a worker.
        """
        for slot in map(self.slot, self.late()):
            slot.failures += 1
            last = not self._ever_built or slot.failures >= self._options.max_attempts
            error = f"the worker was not built within start_timeout_s ({self._options.start_timeout_s:g} s)"
            self._lost(slot, error, give_up=last, tries=slot.failures, on_event=on_event)

    def release_idle(self, on_event: Callback) -> list[int]:
        """End replicas that have waited for work too long, all but one; return them."""
        now, limit = self._clock(), self._options.idle_release_s
        idle = [slot for slot in self.up if slot.idle_since is not None]
        keep = _STANDBY if self._options.straggler_factor or len(idle) == len(self.up) else 0
        waited = [slot for slot in idle if slot.idle_since is not None and slot.idle_since + limit <= now]
        released = waited[keep:] if len(waited) == len(idle) else waited
        for slot in released:
            self.release(slot.index, f"idle for {limit:g} s", on_event)
        return [slot.index for slot in released]

    def release(self, replica: int, reason: str, on_event: Callback, *, shun_node: bool = False) -> None:
        """End a replica on purpose; it may be started again, elsewhere if its node is to be shunned."""
        self._end(self._slots[replica], shun_node=shun_node)
        on_event(ReplicaReleased(replica=replica, reason=reason))

    def next_due(self, after: float) -> float:
        """Return the time of the next thing to do if nothing is answered before.

        Parameters
        ----------
        after : when it was last seen to that everything due is done; a replica may be due and not be wanted.
        """
        return min((due for due in self._due_times() if due > after), default=math.inf)

    def close(self) -> None:
        """Forget every replica, after the backend has killed them."""
        for slot in self._slots:
            slot.state, slot.leaving, slot.idle_since = State.ABSENT, None, None
        self._ever_built = False

    def _due_times(self) -> Iterator[float]:
        for slot in self._slots:
            if slot.state is State.ABSENT:
                yield slot.due
            elif slot.state is State.BUILDING:
                yield slot.deadline
            elif slot.state is State.UP and slot.idle_since is not None:
                yield slot.idle_since + self._options.idle_release_s
        if self._homeless_since is not None:
            yield self._homeless_since + self._options.capacity_wait_s
            yield self._homeless_since + self._tell_after

    def _end(self, slot: Slot, *, shun_node: bool = False) -> None:
        self._backend.kill(slot.index, shun_node=shun_node)
        slot.state, slot.leaving, slot.idle_since, slot.deadline = State.ABSENT, None, None, math.inf

    def _lost(self, slot: Slot, error: str, *, give_up: bool, on_event: Callback, tries: int = 1) -> None:
        self._end(slot, shun_node=slot.leaving is not None)
        self._last_error = error
        pause = self._options.backoff(max(slot.losses, slot.failures, 1))
        slot.due = self._clock() + pause
        on_event(ReplicaLost(replica=slot.index, error=error, again_in_s=None if give_up else pause))
        if give_up:
            slot.state = State.GIVEN_UP
            if not self._ever_built:
                raise ReplicaStartError(start_failure(slot.index, error, tries))

    def _require_replicas(self) -> None:
        if all(slot.state is State.GIVEN_UP for slot in self._slots):
            raise PoolError(
                f"No replica is left: all {len(self._slots)} were lost, the last with {self._last_error}. "
                f"Find the cause in the logs, or raise max_restarts ({self._options.max_restarts}), then resume."
            )

    def _require_place(self, on_event: Callback) -> None:
        """Raise when there has been no place for any replica for too long, and could be none."""
        waiting = any(slot.state is State.PLACING for slot in self._slots)
        if not waiting or any(slot.state in (State.BUILDING, State.UP) for slot in self._slots):
            self._homeless_since, self._tell_after = None, _TELL_AFTER_S
            return
        now = self._clock()
        self._homeless_since = now if self._homeless_since is None else self._homeless_since
        waited, limit = now - self._homeless_since, self._options.capacity_wait_s
        places, text = self._backend.capacity()
        if not places and waited >= limit:
            raise PoolError(
                f"The cluster cannot hold the pool: {text}, after {waited:.0f} s. "
                "Ask for smaller replicas, add nodes, or raise capacity_wait_s where an autoscaler adds them."
            )
        if waited >= self._tell_after:
            self._tell_after = 2 * waited
            on_event(PoolWaiting(seconds=waited, reason=text))
