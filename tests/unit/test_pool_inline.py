"""The in-process pool and the dispatch rules it shares with the Ray pool."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import (
    Event,
    Executor,
    InlinePool,
    PoolError,
    PoolOptions,
    ReplicaLost,
    ReplicaStarted,
    ReplicaStartError,
    UnitDone,
    UnitFailed,
    UnitRetried,
    UnitStarted,
    WorkUnit,
)
from cluster.dispatch import Dispatcher, Lease, Outcome, describe_error

DONE = Outcome(seconds=1.0, receipt="receipt")
BROKEN = Outcome(seconds=1.0, error="ValueError: broken")


@dataclass
class FaultyWorker:
    """Raises in the attempts that a table names by unit and attempt, and returns a receipt in all others."""

    faults: dict[tuple[int, int], BaseException]
    attempts: Counter[int] = field(default_factory=Counter)

    def run(self, payload: int) -> dict[str, int]:
        self.attempts[payload] += 1
        if fault := self.faults.get((payload, self.attempts[payload])):
            raise fault
        return {"payload": payload}


def units(count: int, locality: Callable[[int], Any] = lambda index: 0) -> list[WorkUnit]:
    return [WorkUnit(index, locality(index), index) for index in range(count)]


def run_inline(faults: dict[tuple[int, int], BaseException], count: int, max_attempts: int = 3) -> list[Event]:
    events: list[Event] = []
    pool: Executor = InlinePool(lambda: FaultyWorker(faults), PoolOptions(max_attempts=max_attempts))
    pool.run(units(count), events.append)
    pool.close()
    return events


class TestInlinePool:
    def test_unit_without_fault_is_started_and_done(self) -> None:
        started, begun, done = run_inline({}, count=1)
        assert started == ReplicaStarted(replica=0)
        assert begun == UnitStarted(unit=0, replica=0, attempt=1)
        assert isinstance(done, UnitDone)
        assert (done.unit, done.replica, done.attempt, done.receipt) == (0, 0, 1, {"payload": 0})
        assert done.seconds >= 0

    def test_raising_unit_is_retried_then_done(self) -> None:
        events = run_inline({(1, 1): ValueError("bad luck")}, count=3)
        assert UnitRetried(unit=1, replica=0, attempt=1, error="ValueError: bad luck") in events
        done = [event for event in events if isinstance(event, UnitDone)]
        assert [(event.unit, event.attempt) for event in done] == [(0, 1), (1, 2), (2, 1)]

    def test_poison_unit_fails_and_the_others_are_done(self) -> None:
        events = run_inline({(1, attempt): KeyError("x") for attempt in (1, 2, 3)}, count=3)
        assert [event for event in events if isinstance(event, UnitFailed)] == [
            UnitFailed(unit=1, attempts=3, error="KeyError: 'x'")
        ]
        assert {event.unit for event in events if isinstance(event, UnitDone)} == {0, 2}

    def test_sys_exit_in_a_unit_is_an_error_of_that_unit(self) -> None:
        events = run_inline({(0, 1): SystemExit(2)}, count=1)
        assert UnitRetried(unit=0, replica=0, attempt=1, error="SystemExit: 2") in events

    def test_interrupt_leaves_the_run_and_drops_the_worker(self) -> None:
        built: list[FaultyWorker] = []

        def factory() -> FaultyWorker:
            built.append(FaultyWorker({(0, 1): KeyboardInterrupt()} if not built else {}))
            return built[-1]

        pool = InlinePool(factory)
        with pytest.raises(KeyboardInterrupt):
            pool.run(units(2), lambda event: None)
        pool.run(units(2), lambda event: None)
        assert len(built) == 2

    def test_worker_is_built_at_the_first_unit_and_kept_between_runs(self) -> None:
        built: list[FaultyWorker] = []

        def factory() -> FaultyWorker:
            built.append(FaultyWorker({}))
            return built[-1]

        pool = InlinePool(factory)
        pool.run([], lambda event: None)
        assert not built
        pool.run(units(2), lambda event: None)
        pool.run(units(2), lambda event: None)
        assert len(built) == 1
        assert built[0].attempts == {0: 2, 1: 2}

    def test_factory_that_raises_ends_the_run_after_its_attempts(self) -> None:
        calls: list[Event] = []

        def factory() -> FaultyWorker:
            raise OSError("no weights")

        pool = InlinePool(factory, PoolOptions(max_attempts=2))
        with pytest.raises(ReplicaStartError, match=r"Replica 0 cannot start \(tried 2 times\): OSError: no weights\."):
            pool.run(units(2), calls.append)
        assert calls == [ReplicaLost(replica=0, error="OSError: no weights")] * 2

    def test_factory_that_recovers_starts_the_replica(self) -> None:
        failures = iter([OSError("busy")])
        events: list[Event] = []

        def factory() -> FaultyWorker:
            for failure in failures:
                raise failure
            return FaultyWorker({})

        InlinePool(factory).run(units(1), events.append)
        assert events[:2] == [ReplicaLost(replica=0, error="OSError: busy"), ReplicaStarted(replica=0)]

    def test_units_are_pulled_only_a_few_ahead(self) -> None:
        progress = Counter[str]()

        def source() -> Iterator[WorkUnit]:
            for unit in units(100):
                progress["pulled"] += 1
                yield unit

        def watch(event: Event) -> None:
            progress["done"] += isinstance(event, UnitDone)
            assert progress["pulled"] - progress["done"] <= 4 + 1

        InlinePool(lambda: FaultyWorker({})).run(source(), watch)
        assert progress == {"pulled": 100, "done": 100}

    def test_errors_of_the_iterator_reach_the_caller(self) -> None:
        def source() -> Iterator[WorkUnit]:
            yield from units(10)
            raise RuntimeError("plan is broken")

        with pytest.raises(RuntimeError, match="plan is broken"):
            InlinePool(lambda: FaultyWorker({})).run(source(), lambda event: None)


class TestWindow:
    def test_holds_in_flight_units_and_no_more(self) -> None:
        dispatcher = dispatch(units(20), in_flight=2)
        assert [dispatcher.take(0) is not None for _ in range(3)] == [True, True, False]

    def test_only_the_first_unit_of_a_window_has_started(self) -> None:
        events: list[Event] = []
        dispatcher = dispatch(units(20), in_flight=3, events=events)
        leases = take_all(dispatcher, 0)
        assert events == [UnitStarted(unit=0, replica=0, attempt=1)]
        dispatcher.settle(leases[0], DONE)
        assert events[-1] == UnitStarted(unit=1, replica=0, attempt=1)

    def test_last_units_do_not_queue_behind_a_busy_replica(self) -> None:
        dispatcher = dispatch(units(2), replicas=2, in_flight=2)
        assert len(take_all(dispatcher, 0)) == 1
        assert len(take_all(dispatcher, 1)) == 1


class TestLocality:
    def test_replica_stays_with_the_locality_it_served_last(self) -> None:
        dispatcher = dispatch(units(8, locality=lambda index: "ab"[index % 2]), replicas=2, in_flight=1)
        assert served(dispatcher, [0, 1, 0, 1, 0, 1]) == ["a", "b", "a", "b", "a", "b"]

    def test_new_replica_takes_the_oldest_unit_of_a_locality_nobody_has(self) -> None:
        dispatcher = dispatch(units(8, locality=lambda index: index // 3), replicas=2, in_flight=1)
        first, second = dispatcher.take(0), dispatcher.take(1)
        assert first is not None
        assert second is not None
        assert (first.unit.id, second.unit.id) == (0, 3)

    def test_replica_without_choice_helps_with_the_oldest_unit(self) -> None:
        dispatcher = dispatch(units(8), replicas=2, in_flight=1)
        first, second = dispatcher.take(0), dispatcher.take(1)
        assert first is not None
        assert second is not None
        assert (first.unit.id, second.unit.id) == (0, 1)

    def test_lost_replica_owns_no_locality(self) -> None:
        dispatcher = dispatch(units(8, locality=lambda index: index // 3), replicas=2, in_flight=1)
        dispatcher.take(0)
        dispatcher.lose(0, "gone")
        lease = dispatcher.take(1)
        assert lease is not None
        assert lease.unit.id == 0


class TestLoss:
    def test_running_unit_is_charged_and_waiting_units_are_not(self) -> None:
        events: list[Event] = []
        dispatcher = dispatch(units(20), in_flight=3, events=events)
        take_all(dispatcher, 0)
        dispatcher.lose(0, "died")
        assert events[1:] == [
            ReplicaLost(replica=0, error="died"),
            UnitRetried(unit=0, replica=0, attempt=1, error="died"),
        ]
        attempts = {}
        for _ in range(3):
            lease = dispatcher.take(0)
            assert lease is not None
            attempts[lease.unit.id] = lease.attempt
            dispatcher.settle(lease, DONE)
        assert attempts == {0: 2, 1: 1, 2: 1}

    def test_unit_that_kills_at_every_attempt_fails(self) -> None:
        events: list[Event] = []
        dispatcher = dispatch(units(1), max_attempts=2, events=events)
        for _ in range(2):
            dispatcher.take(0)
            dispatcher.lose(0, "died")
        assert events[-1] == UnitFailed(unit=0, attempts=2, error="died")
        assert dispatcher.finished

    def test_units_of_a_lost_window_run_alone(self) -> None:
        dispatcher = dispatch(units(20), in_flight=2)
        take_all(dispatcher, 0)
        dispatcher.lose(0, "died")
        for expected in ([0], [1], [2, 3]):
            leases = take_all(dispatcher, 0)
            assert [lease.unit.id for lease in leases] == expected
            for lease in leases:
                dispatcher.settle(lease, DONE)

    def test_unit_that_must_run_alone_does_not_join_a_busy_window(self) -> None:
        dispatcher = dispatch(units(20), replicas=2, in_flight=2)
        first, _ = take_all(dispatcher, 0)
        take_all(dispatcher, 1)
        dispatcher.lose(1, "died")
        dispatcher.settle(first, DONE)
        joined = dispatcher.take(0)
        assert joined is not None
        assert joined.unit.id == 4

    def test_late_answer_of_a_lost_replica_is_ignored(self) -> None:
        events: list[Event] = []
        dispatcher = dispatch(units(1), events=events)
        late = dispatcher.take(0)
        assert late is not None
        dispatcher.lose(0, "unreachable")
        current = dispatcher.take(0)
        assert current is not None
        before = list(events)
        dispatcher.settle(late, DONE)
        assert events == before
        dispatcher.settle(current, DONE)
        dispatcher.settle(current, DONE)
        assert sum(isinstance(event, UnitDone) for event in events) == 1

    def test_answer_before_that_of_the_unit_ahead_counts_as_started(self) -> None:
        events: list[Event] = []
        dispatcher = dispatch(units(20), in_flight=2, events=events)
        _, second = take_all(dispatcher, 0)
        dispatcher.settle(second, DONE)
        assert events[1:] == [
            UnitStarted(unit=1, replica=0, attempt=1),
            UnitDone(unit=1, replica=0, attempt=1, seconds=1.0, receipt="receipt"),
        ]


@st.composite
def fault_tables(draw: st.DrawFn) -> tuple[PoolOptions, list[int], list[list[str]]]:
    """Pool options, the locality of each unit, and the fate of its attempts, one word each."""
    options = PoolOptions(
        replicas=draw(st.integers(1, 4)),
        in_flight=draw(st.integers(1, 3)),
        max_attempts=draw(st.integers(1, 3)),
    )
    localities = draw(st.lists(st.integers(0, 3), max_size=40))
    fate = st.lists(st.sampled_from(["done", "raise", "die"]), min_size=3, max_size=3)
    return options, localities, draw(st.lists(fate, min_size=len(localities), max_size=len(localities)))


@given(table=fault_tables(), random=st.randoms(use_true_random=False))
def test_any_fault_table_ends_every_unit_once(
    table: tuple[PoolOptions, list[int], list[list[str]]], random: Any
) -> None:
    """Replicas answer in any order; what a unit's attempts do is all that decides its end."""
    options, localities, fates = table
    events: list[Event] = []
    pulled: list[int] = []

    def source() -> Iterator[WorkUnit]:
        for index, locality in enumerate(localities):
            pulled.append(index)
            yield WorkUnit(index, locality, None)

    dispatcher = Dispatcher(source(), options, events.append)
    windows: dict[int, list[Lease]] = {replica: [] for replica in range(options.replicas)}
    while not dispatcher.finished:
        for replica in random.sample(sorted(windows), len(windows)):
            while (lease := dispatcher.take(replica)) is not None:
                windows[replica].append(lease)
            assert len(windows[replica]) <= options.in_flight
        held = [lease.unit.id for window in windows.values() for lease in window]
        assert len(held) == len(set(held))
        assert len(pulled) - ended(events) <= (4 + 1) * options.replicas * options.in_flight
        replica = random.choice([index for index, window in windows.items() if window])
        lease = windows[replica].pop(0)
        match fates[lease.unit.id][lease.attempt - 1]:
            case "done":
                dispatcher.settle(lease, DONE)
            case "raise":
                dispatcher.settle(lease, BROKEN)
            case "die":
                dispatcher.lose(replica, "died")
                windows[replica].clear()

    for index, fate in enumerate(fates):
        tried = fate[: options.max_attempts]
        expected = tried.index("done") + 1 if "done" in tried else None
        mine = [event for event in events if getattr(event, "unit", None) == index]
        assert sum(isinstance(event, UnitStarted) for event in mine) == (expected or options.max_attempts)
        ends = [event for event in mine if isinstance(event, UnitDone | UnitFailed)]
        assert len(ends) == 1
        assert mine[-1] is ends[0]
        if isinstance(ends[0], UnitDone):
            assert ends[0].attempt == expected
        else:
            assert (expected, ends[0].attempts) == (None, options.max_attempts)


class TestValues:
    def test_duplicate_unit_is_refused(self) -> None:
        with pytest.raises(ValueError, match="Two units share an id: 5"):
            dispatch([WorkUnit(5, 0, None), WorkUnit(5, 0, None)])

    @pytest.mark.parametrize(
        ("name", "value"),
        [("replicas", -1), ("in_flight", 0), ("max_attempts", 0), ("max_restarts", -1), ("gpus_per_replica", -0.5)],
    )
    def test_option_out_of_range_is_refused_by_name(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=rf"PoolOptions\.{name} is too small: {value}\."):
            PoolOptions(**{name: value})  # type: ignore[arg-type]

    def test_error_text_is_one_short_line_with_both_ends(self) -> None:
        text = describe_error(ValueError("begin\n  " + "x" * 5000 + "\nend"))
        assert text.startswith("ValueError: begin x")
        assert text.endswith("x end")
        assert len(text) <= 500

    def test_error_without_text_shows_its_type(self) -> None:
        assert describe_error(ValueError()) == "ValueError"

    def test_start_error_is_a_pool_error(self) -> None:
        assert issubclass(ReplicaStartError, PoolError)

    def test_package_does_not_import_ray(self) -> None:
        command = "import sys, cluster; sys.exit('ray' in sys.modules)"
        root = Path(__file__).resolve().parents[2]
        assert subprocess.run([sys.executable, "-c", command], cwd=root, check=False).returncode == 0


def dispatch(
    source: Iterable[WorkUnit],
    *,
    replicas: int = 1,
    in_flight: int = 2,
    max_attempts: int = 3,
    events: list[Event] | None = None,
) -> Dispatcher:
    options = PoolOptions(replicas=replicas, in_flight=in_flight, max_attempts=max_attempts)
    return Dispatcher(source, options, (events if events is not None else []).append)


def take_all(dispatcher: Dispatcher, replica: int) -> list[Lease]:
    leases = []
    while (lease := dispatcher.take(replica)) is not None:
        leases.append(lease)
    return leases


def served(dispatcher: Dispatcher, replicas: list[int]) -> list[Any]:
    """Let replicas take and finish one unit each in the given order; return the localities."""
    localities = []
    for replica in replicas:
        lease = dispatcher.take(replica)
        assert lease is not None
        localities.append(lease.unit.locality)
        dispatcher.settle(lease, DONE)
    return localities


def ended(events: list[Event]) -> int:
    return sum(isinstance(event, UnitDone | UnitFailed) for event in events)
