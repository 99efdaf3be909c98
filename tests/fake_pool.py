"""A backend in virtual time: nodes, processes, units and builds do what tables say, without threads or sleep.

A run in it shows what a pool does in hours of faults within milliseconds, and the same each time.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from cluster import (
    Event,
    PoolError,
    PoolOptions,
    ReplicaLost,
    ReplicaReleased,
    ReplicaStarted,
    UnitDone,
    UnitFailed,
    UnitRetried,
    UnitStarted,
    WorkUnit,
)
from cluster.backend import Answer, BuildFailed, Built, Died, Finished, Leaving, Placed
from cluster.pool import Pool
from cluster.work import Outcome

PLACE_S, BUILD_S, UNIT_S = 0.1, 0.5, 1.0
FATE = re.compile(r"(slow x(?P<factor>\d+(\.\d+)?))?( ?(?P<kind>done|raise|die|die after write|hang|halt))?")
DIED = "ActorDiedError: the process is gone"


def value_of(unit: int) -> int:
    """Return what every run of a unit writes."""
    return unit * 7 + 3


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine with places for replicas.

    Attributes
    ----------
    joins, leaves : seconds; what runs on it dies when it leaves. notice : when it is told that it will leave.
    taken_until : until then somebody else has its places.
    fate : what every unit meets on it, whatever the table says. slowness : factor on the time of its units.
    """

    name: str = "a"
    places: int = 1
    joins: float = 0.0
    leaves: float = math.inf
    notice: float = math.inf
    taken_until: float = 0.0
    hardware: str = ""
    fate: str | None = None
    slowness: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One time that a process began a unit; ``number`` counts the times of a unit from 1, copies included."""

    unit: int
    number: int
    replica: int
    node: str
    began: float


@dataclass(eq=False)
class Process:
    """The process of a replica, from the request for it to its end."""

    replica: int
    asked: float
    node: Node | None = None
    home: str | None = None
    built: bool = False
    leaving: bool = False
    sent: deque[tuple[int, int]] = field(default_factory=deque)
    running: bool = False


class FakeBackend:
    """Follows the protocol of ``cluster.backend`` to the letter, and fails when the pool does not.

    Parameters
    ----------
    nodes : machines. fates : kind of a unit's run by unit and number of the run, maybe behind "slow x8".
    builds : kind of the n-th build, from 1, or the seconds that it takes. kills : times at which a replica dies.
    weights : seconds of a unit. linger_s : answers within so many seconds arrive together.
    most : replicas that may be alive at once. limit_s : virtual seconds after which the run counts as endless.
    """

    def __init__(
        self,
        nodes: Sequence[Node] = (Node(places=100),),
        *,
        fates: Mapping[tuple[int, int], str] | None = None,
        builds: Mapping[int, str | float] | None = None,
        kills: Sequence[tuple[float, int]] = (),
        weights: Mapping[int, float] | None = None,
        linger_s: float = 0.0,
        most: int = 1000,
        limit_s: float = 1e6,
    ) -> None:
        self.now = 0.0
        self.runs: list[Run] = []
        self.writes: dict[int, int] = {}
        self.written: Counter[int] = Counter()
        self.builds = 0
        self.spawns: list[tuple[float, int]] = []
        self.most_alive = self.waits = 0
        self.opened = self.closed = 0
        self._fates, self._builds, self._weights = fates or {}, builds or {}, weights or {}
        self._linger_s, self._most, self._limit_s = linger_s, most, limit_s
        self._processes: dict[int, Process] = {}
        self._nodes: list[Node] = []
        self._told: set[str] = set()
        self._shunned: set[str] = set()
        self._tickets: set[int] = set()
        self._ready: list[tuple[Process, Answer]] = []
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._fruitless = 0
        for node in nodes:
            self._at(node.joins, lambda node=node: self._join(node))
            self._at(node.taken_until, self._place_all)
            if node.notice < math.inf:
                self._at(node.notice, lambda node=node: self._notice(node))
            if node.leaves < math.inf:
                self._at(node.leaves, lambda node=node: self._leave(node))
        for time, replica in kills:
            self._at(time, lambda replica=replica: self._die(self._processes.get(replica)))

    # The protocol.

    def open(self) -> None:
        self.opened += 1

    def capacity(self) -> tuple[int, str]:
        nodes = [node for node in self._nodes if node.name not in self._shunned]
        places = sum(node.places for node in nodes)
        return places, f"a replica asks for 1 place, the cluster has {places} on {len(nodes)} node(s)"

    def spawn(self, replica: int) -> None:
        assert replica not in self._processes, f"replica {replica} lives already"
        self.spawns.append((self.now, replica))
        self._processes[replica] = Process(replica, self.now)
        self.most_alive = max(self.most_alive, len(self._processes))
        assert len(self._processes) <= self._most
        self._at(self.now + PLACE_S, self._place_all)

    def kill(self, replica: int, *, shun_node: bool = False) -> None:
        process = self._processes.pop(replica, None)
        self._ready = [(owner, answer) for owner, answer in self._ready if owner.replica != replica]
        if process is None:
            return
        if shun_node and process.home is not None:
            self._shunned.add(process.home)
        self._place_all()

    def send(self, replica: int, ticket: int, payload: Any) -> None:
        process = self._processes[replica]
        assert process.built, f"replica {replica} got a unit before it had a worker"
        assert ticket not in self._tickets, f"ticket {ticket} was used before"
        self._tickets.add(ticket)
        process.sent.append((ticket, payload))
        self._next_unit(process)

    def wait(self, timeout_s: float) -> list[Answer]:
        assert timeout_s >= 0
        self.waits += 1
        before, deadline = self.now, self.now + timeout_s
        while not self._ready and self._agenda and self._agenda[0][0] <= deadline:
            self._act()
        if self._ready:
            until = min(deadline, self.now + self._linger_s)
            while self._agenda and self._agenda[0][0] <= until:
                self._act()
        else:
            self.now = deadline
        answers = [answer for _, answer in self._ready]
        self._ready.clear()
        self._fruitless = 0 if answers or self.now > before else self._fruitless + 1
        assert self._fruitless < 10, "the pool spins: it waits for nothing again and again"
        assert self.now < self._limit_s, "the run does not end"
        return sorted(answers, key=lambda answer: isinstance(answer, Died))

    def close(self) -> None:
        self.closed += 1
        for replica in list(self._processes):
            self.kill(replica)

    # What the tables make happen.

    @property
    def alive(self) -> dict[int, str]:
        """Names of the nodes of living replicas that have a place."""
        return {index: process.node.name for index, process in self._processes.items() if process.node is not None}

    def unit_seconds(self, unit: int) -> float:
        return UNIT_S * self._weights.get(unit, 1.0)

    def _at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (time, next(self._order), action))

    def _act(self) -> None:
        time, _, action = heapq.heappop(self._agenda)
        self.now = max(self.now, time)
        action()

    def _lives(self, process: Process | None) -> bool:
        return process is not None and self._processes.get(process.replica) is process

    def _answer(self, process: Process, answer: Answer) -> None:
        assert self._lives(process)
        self._ready.append((process, answer))

    def _join(self, node: Node) -> None:
        self._nodes.append(node)
        self._place_all()

    def _leave(self, node: Node) -> None:
        self._nodes.remove(node)
        for process in [process for process in self._processes.values() if process.node is node]:
            self._die(process)

    def _notice(self, node: Node) -> None:
        self._told.add(node.name)
        for process in self._processes.values():
            if process.node is node:
                self._tell(process)

    def _tell(self, process: Process) -> None:
        assert process.node is not None
        process.leaving = True
        self._answer(process, Leaving(replica=process.replica, reason=f"node {process.node.name} will go"))

    def _die(self, process: Process | None) -> None:
        """End a process from below; it stays known until the pool has heard of it."""
        if process is None or not self._lives(process) or process.node is None:
            return
        process.node, process.built, process.running = None, True, True
        process.sent.clear()
        self._answer(process, Died(replica=process.replica, error=DIED))

    def _place_all(self) -> None:
        for process in self._processes.values():
            if process.node is None and not process.running and process.asked + PLACE_S <= self.now:
                self._place(process)

    def _place(self, process: Process) -> None:
        used = Counter(other.node.name for other in self._processes.values() if other.node is not None)
        open_to_us = [n for n in self._nodes if n.name not in self._shunned and n.taken_until <= self.now]
        free = [node for node in open_to_us if used[node.name] < node.places]
        if not free:
            return
        # Spread, as Ray does.
        process.node = min(free, key=lambda node: used[node.name])
        # Known beyond its death, as Ray's is.
        process.home = process.node.name
        self._answer(process, Placed(replica=process.replica))
        if process.node.name in self._told:
            self._tell(process)
        self.builds += 1
        kind = self._builds.get(self.builds, BUILD_S)
        seconds = kind if isinstance(kind, int | float) else BUILD_S
        self._at(self.now + seconds, lambda: self._build(process, kind))

    def _build(self, process: Process, kind: str | float) -> None:
        if not self._lives(process) or process.node is None:
            return
        if kind == "raise":
            self._answer(process, BuildFailed(replica=process.replica, error="OSError: no weights"))
        elif kind == "die":
            self._die(process)
        elif kind != "hang":
            process.built = True
            self._answer(process, Built(replica=process.replica, hardware=process.node.hardware))

    def _next_unit(self, process: Process) -> None:
        if process.running or not process.sent:
            return
        ticket, unit = process.sent.popleft()
        process.running = True
        if process.leaving:
            self._at(self.now, lambda: self._end(process, ticket, Outcome(seconds=0.0, refused=True)))
            return
        assert process.node is not None
        number = 1 + sum(run.unit == unit for run in self.runs)
        self.runs.append(Run(unit=unit, number=number, replica=process.replica, node=process.node.name, began=self.now))
        fate = process.node.fate or self._fates.get((unit, number), "done")
        parts = FATE.fullmatch(fate)
        assert parts is not None, fate
        kind = parts["kind"] or "done"
        seconds = self.unit_seconds(unit) * float(parts["factor"] or 1) * process.node.slowness
        self._at(self.now + seconds, lambda: self._finish(process, ticket, unit, kind, seconds))

    def _finish(self, process: Process, ticket: int, unit: int, kind: str, seconds: float) -> None:
        if not self._lives(process) or process.node is None or kind == "hang":
            return
        if kind in ("done", "die after write"):
            assert self.writes.setdefault(unit, value_of(unit)) == value_of(unit)
            self.written[unit] += 1
        match kind:
            case "done":
                outcome = Outcome(seconds=seconds, receipt=value_of(unit))
            case "raise":
                outcome = Outcome(seconds=seconds, error=f"ValueError: unit {unit} is broken")
            case "halt":
                outcome = Outcome(seconds=seconds, error="OSError: disk full", halts=True)
            case _:
                self._die(process)
                return
        self._end(process, ticket, outcome)

    def _end(self, process: Process, ticket: int, outcome: Outcome) -> None:
        if self._lives(process) and process.node is not None:
            process.running = False
            self._answer(process, Finished(replica=process.replica, ticket=ticket, outcome=outcome))
            self._next_unit(process)


def work(number: int, *, locality: Callable[[int], Hashable] = lambda unit: 0, first: int = 0) -> list[WorkUnit]:
    """Return units whose payload is their id."""
    return [WorkUnit(unit, locality(unit), unit) for unit in range(first, first + number)]


@dataclass
class Bench:
    """A pool on a fake backend, and the events of its runs with their times."""

    backend: FakeBackend
    pool: Pool
    log: list[tuple[float, Event]] = field(default_factory=list)
    finished: bool | None = None
    error: PoolError | None = None

    def run(
        self,
        units: Iterable[WorkUnit],
        *,
        stop: Callable[[], str | None] = lambda: None,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> Bench:
        """Run units; a PoolError is kept as the result."""

        def observe(event: Event) -> None:
            self.log.append((self.backend.now, event))
            on_event(event)

        self.finished, self.error = None, None
        try:
            self.finished = self.pool.run(units, observe, stop)
        except PoolError as error:
            self.error = error
        return self

    @property
    def events(self) -> list[Event]:
        return [event for _, event in self.log]

    def of(self, *kinds: type) -> list[Any]:
        """Return the events of some kinds."""
        return [event for event in self.events if isinstance(event, kinds)]

    def times(self, kind: type) -> list[float]:
        return [time for time, event in self.log if isinstance(event, kind)]

    @property
    def done(self) -> list[int]:
        return sorted(event.unit for event in self.of(UnitDone))

    @property
    def failed(self) -> list[int]:
        return sorted(event.unit for event in self.of(UnitFailed))

    @property
    def charged(self) -> dict[int, int]:
        """Attempts that did not end well, by unit."""
        tries = [event for event in self.of(UnitRetried) if not event.error.startswith("not charged")]
        return dict(Counter(event.unit for event in [*tries, *self.of(UnitFailed)]))

    def runs_of(self, unit: int) -> list[Run]:
        return [run for run in self.backend.runs if run.unit == unit]

    def attempts(self, unit: int) -> list[UnitStarted]:
        """Return the starts of a unit that are no copies."""
        return [event for event in self.of(UnitStarted) if event.unit == unit and not event.copy]

    @property
    def lost(self) -> list[ReplicaLost]:
        return self.of(ReplicaLost)

    @property
    def started(self) -> list[ReplicaStarted]:
        return self.of(ReplicaStarted)

    @property
    def released(self) -> list[ReplicaReleased]:
        return self.of(ReplicaReleased)


def bench(
    nodes: Sequence[Node] = (Node(places=100),),
    *,
    fates: Mapping[tuple[int, int], str] | None = None,
    builds: Mapping[int, str | float] | None = None,
    kills: Sequence[tuple[float, int]] = (),
    weights: Mapping[int, float] | None = None,
    linger_s: float = 0.0,
    limit_s: float = 1e6,
    **options: Any,
) -> Bench:
    """Make a pool over tables; every other argument is one of ``PoolOptions``."""
    chosen = PoolOptions(**options)
    backend = FakeBackend(
        nodes,
        fates=fates,
        builds=builds,
        kills=kills,
        weights=weights,
        linger_s=linger_s,
        most=chosen.replicas,
        limit_s=limit_s,
    )
    return Bench(backend, Pool(backend, chosen, clock=lambda: backend.now))


def every_run(units: Iterable[int], fate: str, runs: int = 20) -> dict[tuple[int, int], str]:
    """Return a table in which every run of some units has one fate."""
    return {(unit, run): fate for unit in units for run in range(1, runs + 1)}


def counted(units: Iterable[WorkUnit], pulled: Counter[str]) -> Iterator[WorkUnit]:
    """Count the units that are pulled from an iterable."""
    for unit in units:
        pulled["pulled"] += 1
        yield unit
