"""The rules by which units go to replicas, one step at a time, with replicas that answer as the test says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import Event, PoolDraining, PoolOptions, UnitDone, UnitFailed, UnitRetried, UnitStarted, WorkUnit
from cluster.dispatch import Dispatcher, Lease
from cluster.work import Outcome
from tests.fake_pool import work as units

DONE = Outcome(seconds=1.0, receipt="receipt")
BROKEN = Outcome(seconds=1.0, error="ValueError: broken")
REFUSED = Outcome(seconds=0.0, refused=True)
FULL = Outcome(seconds=1.0, error="OSError: full", halts=True)


@dataclass
class Clock:
    """Time that only the test moves."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


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
        assert lease.unit.locality == 0


class TestLoss:
    def test_running_unit_is_charged_and_waiting_units_are_not(self) -> None:
        events: list[Event] = []
        dispatcher = dispatch(units(20), in_flight=3, events=events)
        take_all(dispatcher, 0)
        dispatcher.lose(0, "died")
        assert events[1:] == [UnitRetried(unit=0, replica=0, attempt=1, error="died")]
        attempts = {}
        for _ in range(20):
            lease = dispatcher.take(0)
            assert lease is not None
            attempts[lease.unit.id] = lease.attempt
            dispatcher.settle(lease, DONE)
        assert attempts == {unit: 1 + (unit == 0) for unit in range(20)}

    def test_unit_that_kills_at_every_attempt_fails(self) -> None:
        events: list[Event] = []
        dispatcher = dispatch(units(1), max_attempts=2, events=events)
        for _ in range(2):
            dispatcher.take(0)
            assert dispatcher.lose(0, "died") == [0]
        assert events[-1] == UnitFailed(unit=0, attempts=2, error="died")
        assert dispatcher.finished

    def test_units_of_a_lost_window_run_alone(self) -> None:
        dispatcher = dispatch(units(20), in_flight=2)
        take_all(dispatcher, 0)
        dispatcher.lose(0, "died")
        windows = []
        while leases := take_all(dispatcher, 0):
            windows.append([lease.unit.id for lease in leases])
            for lease in leases:
                dispatcher.settle(lease, DONE)
        assert [window for window in windows if {0, 1} & set(window)] == [[1], [0]]
        assert [2, 3] in windows

    def test_unit_that_was_charged_comes_after_those_pulled_before(self) -> None:
        dispatcher = dispatch(units(20), in_flight=1)
        order = []
        while (lease := dispatcher.take(0)) is not None:
            order.append(lease.unit.id)
            if order.count(0) == 1 and lease.unit.id == 0:
                dispatcher.lose(0, "died")
            else:
                dispatcher.settle(lease, DONE)
        assert order[:5] == [0, 1, 2, 3, 4]
        assert order.index(0, 1) > 5

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


class TestOnPurpose:
    def test_a_replica_that_is_ended_on_purpose_charges_nobody(self) -> None:
        events: list[Event] = []
        dispatcher = dispatch(units(2), max_attempts=1, events=events)
        dispatcher.take(0)
        dispatcher.withdraw(0, "its node will go")
        assert events[-1] == UnitRetried(unit=0, replica=0, attempt=1, error="not charged: its node will go")
        lease = dispatcher.take(1)
        assert lease is not None
        assert (lease.unit.id, lease.attempt) == (0, 1)

    @pytest.mark.parametrize("outcome", [REFUSED, FULL], ids=["refused", "halted"])
    def test_what_is_not_the_fault_of_a_unit_is_not_charged(self, outcome: Outcome) -> None:
        events: list[Event] = []
        dispatcher = dispatch(units(1), max_attempts=1, events=events)
        for _ in range(5):
            lease = dispatcher.take(0)
            assert lease is not None
            assert lease.attempt == 1
            dispatcher.settle(lease, outcome)
        assert not dispatcher.finished
        assert not [event for event in events if isinstance(event, UnitFailed)]

    def test_units_that_were_refused_together_come_again_alone(self) -> None:
        """One receipt of a batch may be at fault; alone, each shows whether it is the one."""
        dispatcher = dispatch(units(20), in_flight=2)
        for lease in take_all(dispatcher, 0):
            dispatcher.settle(lease, REFUSED)
        assert len(take_all(dispatcher, 0)) == 1


class TestLeases:
    def test_a_lease_is_overdue_from_its_end_on(self) -> None:
        clock = Clock()
        dispatcher = dispatch(units(20), lease_s=10, clock=clock)
        clock.now = 5.0
        dispatcher.take(0)
        assert dispatcher.next_overdue() == 15.0
        clock.now = 14.9
        assert dispatcher.overdue() == []
        clock.now = 15.0
        assert dispatcher.overdue() == [0]

    def test_the_lease_of_the_next_unit_begins_when_the_one_before_ends(self) -> None:
        clock = Clock()
        dispatcher = dispatch(units(20), lease_s=10, clock=clock)
        first, _ = take_all(dispatcher, 0)
        clock.now = 9.0
        dispatcher.settle(first, DONE)
        assert dispatcher.next_overdue() == 19.0

    def test_nothing_is_overdue_without_a_lease(self) -> None:
        dispatcher = dispatch(units(3))
        assert (dispatcher.overdue(), dispatcher.next_overdue()) == ([], float("inf"))

    def test_a_unit_that_went_elsewhere_still_holds_its_old_replica_to_the_lease(self) -> None:
        """Replica 0 may hang in what replica 2 has taken from it; it is needed if the others go."""
        clock = Clock()
        dispatcher = straggling(clock)
        original, _, taken = next(dispatcher._leases()), dispatcher.help(1), dispatcher.help(2)
        assert taken is not None
        dispatcher.settle(original, DONE)
        clock.now += 999.0
        assert 0 not in dispatcher.overdue()
        clock.now += 1.0
        assert 0 in dispatcher.overdue()


class TestStragglers:
    def test_an_idle_replica_first_copies_then_takes_what_waits_behind(self) -> None:
        clock = Clock()
        events: list[Event] = []
        dispatcher = straggling(clock, events)
        copied, taken = dispatcher.help(1), dispatcher.help(2)
        assert copied is not None
        assert taken is not None
        assert events[-2:] == [
            UnitStarted(unit=copied.unit.id, replica=1, attempt=1, copy=True),
            UnitStarted(unit=taken.unit.id, replica=2, attempt=1),
        ]
        assert dispatcher.help(3) is None

    def test_the_old_place_of_a_unit_that_was_taken_no_longer_counts(self) -> None:
        clock = Clock()
        events: list[Event] = []
        dispatcher = straggling(clock, events)
        copied, taken = dispatcher.help(1), dispatcher.help(2)
        assert copied is not None
        assert taken is not None
        assert dispatcher.lose(0, "died") == []
        dispatcher.settle(taken, DONE)
        dispatcher.settle(copied, DONE)
        assert dispatcher.finished
        assert not [event for event in events if isinstance(event, UnitRetried | UnitFailed)]

    def test_nothing_straggles_before_its_time(self) -> None:
        clock = Clock()
        dispatcher = straggling(clock)
        clock.now -= 0.1
        assert dispatcher.help(1) is None

    def test_replicas_of_other_hardware_do_not_help(self) -> None:
        clock = Clock()
        dispatcher = straggling(clock)
        dispatcher.join(1, "other")
        assert dispatcher.help(1) is None


class TestDrain:
    def test_nothing_is_handed_out_and_the_running_units_are_counted_once(self) -> None:
        events: list[Event] = []
        dispatcher = dispatch(units(20), replicas=2, in_flight=2, events=events)
        running, waiting = take_all(dispatcher, 0)
        dispatcher.drain(30)
        dispatcher.drain(30)
        assert [event for event in events if isinstance(event, PoolDraining)] == [PoolDraining(units=1, limit_s=30)]
        assert dispatcher.take(1) is None
        assert not dispatcher.drained
        dispatcher.settle(running, DONE)
        assert dispatcher.drained
        assert waiting.attempt == 0

    def test_the_answer_of_a_waiting_unit_that_ran_all_the_same_counts(self) -> None:
        events: list[Event] = []
        dispatcher = dispatch(units(20), in_flight=2, events=events)
        running, waiting = take_all(dispatcher, 0)
        dispatcher.drain(30)
        dispatcher.settle(running, DONE)
        dispatcher.settle(waiting, DONE)
        assert [event.unit for event in events if isinstance(event, UnitDone)] == [0, 1]


class TestDemand:
    def test_counts_units_that_nobody_holds_and_replicas_that_hold_some(self) -> None:
        dispatcher = dispatch(units(3), replicas=3)
        assert dispatcher.demand == 3
        lease = dispatcher.take(0)
        assert lease is not None
        assert dispatcher.demand == 3
        dispatcher.settle(lease, DONE)
        assert dispatcher.demand == 2

    def test_duplicate_unit_is_refused(self) -> None:
        with pytest.raises(ValueError, match="Two units share an id: 5"):
            dispatch([WorkUnit(5, 0, None), WorkUnit(5, 0, None)])


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
        assert len(pulled) - ended(events) <= options.replicas * (options.in_flight + max(4 * options.in_flight, 6))
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


def dispatch(
    source: Iterable[WorkUnit],
    *,
    events: list[Event] | None = None,
    clock: Callable[[], float] | None = None,
    **options: Any,
) -> Dispatcher:
    chosen = PoolOptions(**{"in_flight": 2, **options})
    return Dispatcher(source, chosen, (events if events is not None else []).append, clock or Clock())


def straggling(clock: Clock, events: list[Event] | None = None) -> Dispatcher:
    """Return a dispatcher with idle replicas 1 to 3, whose replica 0 has straggled from now on with one more behind."""
    dispatcher = dispatch(
        units(10), replicas=1, in_flight=2, straggler_factor=3, lease_s=1000, clock=clock, events=events
    )
    for replica in range(4):
        dispatcher.join(replica)
    held = take_all(dispatcher, 0)
    while len(rest := take_all(dispatcher, 1)) > 0:
        for lease in rest:
            dispatcher.settle(lease, DONE)
    assert [lease.attempt for lease in held] == [1, 0]
    clock.now += 3.0
    return dispatcher


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
