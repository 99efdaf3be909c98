"""Stopping a run: what runs may finish, what waits stays pending, and the pool can go on later."""

from __future__ import annotations

import itertools

import pytest

from cluster import PoolDraining, UnitRetried, UnitStarted
from tests.fake_pool import Bench, Node, bench, every_run, work


def stopped(seconds: float, units: int = 40, **options: object) -> Bench:
    """Run units with a reason to stop from some time on."""
    pool = bench(**options)  # type: ignore[arg-type]
    return pool.run(work(units), stop=lambda: "told to" if pool.backend.now >= seconds else None)


def test_running_units_finish_and_waiting_ones_stay_pending() -> None:
    pool = stopped(5.0, replicas=2, in_flight=2, fates=every_run(range(40), "slow x4"))
    assert pool.finished is False
    started = {event.unit for event in pool.of(UnitStarted)}
    assert set(pool.done) == started == set(pool.backend.writes)
    assert len(pool.done) == 4
    assert not pool.charged
    assert not pool.of(UnitRetried)
    assert pool.backend.alive == {}


def test_the_observer_is_told_how_many_units_run_and_for_how_long() -> None:
    pool = stopped(5.0, replicas=3, in_flight=2, fates=every_run(range(40), "slow x4"), drain_s=77)
    assert pool.of(PoolDraining) == [PoolDraining(units=3, limit_s=77)]


def test_no_unit_starts_after_the_reason_to_stop() -> None:
    pool = stopped(5.0, replicas=2, in_flight=3, fates=every_run(range(40), "slow x4"))
    draining = pool.events.index(pool.of(PoolDraining)[0])
    assert not [event for event in pool.events[draining:] if isinstance(event, UnitStarted)]


def test_the_reason_is_heard_within_about_a_second_of_quiet() -> None:
    pool = stopped(5.0, replicas=2, fates=every_run(range(40), "slow x100"), drain_s=0)
    assert pool.done == []
    assert pool.backend.now < 6.5


@pytest.mark.parametrize("drain_s", [0, 10, 30])
def test_a_unit_that_takes_too_long_does_not_hold_up_the_end(drain_s: float) -> None:
    pool = stopped(5.0, replicas=2, fates={(0, 1): "slow x1000"}, drain_s=drain_s, straggler_factor=0)
    assert pool.finished is False
    assert 0 not in pool.done
    assert not pool.charged
    assert not pool.failed
    assert pool.backend.now <= 5 + drain_s + 2


def test_a_unit_that_fails_while_stopping_is_not_tried_again() -> None:
    pool = stopped(5.0, replicas=1, fates={(1, 1): "slow x9 raise"})
    assert pool.done == [0]
    assert len(pool.runs_of(1)) == 1
    assert pool.finished is False


def test_a_replica_that_dies_while_stopping_is_not_replaced() -> None:
    pool = stopped(3.0, replicas=2, fates={(2, 1): "slow x6 die", (3, 1): "slow x20"}, backoff_s=0.1)
    assert len(pool.backend.spawns) == 2
    assert 3 in pool.done
    assert pool.finished is False


def test_a_reason_before_the_first_unit_starts_nothing() -> None:
    pool = stopped(0.0, replicas=2)
    assert pool.finished is False
    assert not pool.of(UnitStarted)
    assert pool.backend.now < 2


def test_a_run_whose_last_units_finish_while_stopping_is_whole() -> None:
    pool = stopped(1.0, units=2, replicas=2, fates=every_run(range(2), "slow x5"))
    assert pool.done == [0, 1]
    assert pool.finished is True


def test_a_stopped_pool_runs_the_rest_later() -> None:
    pool = stopped(5.0, replicas=2)
    rest = [unit for unit in work(40) if unit.id not in pool.done]
    pool.run(rest)
    assert pool.finished is True
    assert pool.done == list(range(40))


def test_the_reason_is_asked_for_about_once_a_second() -> None:
    asked: list[float] = []
    pool = bench(replicas=4)

    def stop() -> None:
        asked.append(pool.backend.now)

    pool.run(work(4 * 50), stop=stop)
    assert pool.finished is True
    assert all(later - earlier > 0.99 for earlier, later in itertools.pairwise(asked))
    assert len(asked) >= pool.backend.now / 2


def test_a_hung_unit_is_left_to_the_limit_of_the_stop_or_its_lease() -> None:
    pool = stopped(3.0, replicas=2, fates={(2, 1): "hang"}, lease_s=8, drain_s=100, straggler_factor=0)
    assert pool.finished is False
    assert 2 not in pool.done
    assert pool.backend.now < 15


def test_nodes_that_leave_while_stopping_take_only_their_own_units() -> None:
    nodes = [Node(name="a", leaves=6.0), Node(name="b")]
    pool = stopped(3.0, nodes=nodes, replicas=2, fates=every_run(range(2, 40), "slow x9"), drain_s=60)
    assert len(pool.done) == 3
    assert pool.finished is False
