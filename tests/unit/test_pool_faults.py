"""What the pool does when units, replicas and builds fail; faults are tables, time is virtual."""

from __future__ import annotations

import pytest

from cluster import (
    PoolError,
    PoolHaltedError,
    ReplicaLost,
    ReplicaStarted,
    ReplicaStartError,
    UnitDone,
    UnitRetried,
    UnitStarted,
)
from tests.fake_pool import DIED, Node, bench, every_run, value_of, work


def test_units_are_done_once_each_by_all_replicas() -> None:
    pool = bench(replicas=3).run(work(12))
    assert pool.finished is True
    assert pool.done == list(range(12))
    assert pool.backend.writes == {unit: value_of(unit) for unit in range(12)}
    assert {event.replica for event in pool.of(UnitStarted)} == {0, 1, 2}
    assert max(pool.backend.written.values()) == 1


class TestLeases:
    def test_a_hung_replica_is_killed_and_its_unit_done_elsewhere_charged_once(self) -> None:
        pool = bench(replicas=2, fates={(3, 1): "hang"}, lease_s=10, straggler_factor=0).run(work(6))
        assert pool.done == list(range(6))
        assert pool.charged == {3: 1}
        hung, again = pool.runs_of(3)
        assert again.began >= hung.began + 10
        assert again.replica != hung.replica
        assert [(lost.replica, "lease of 10 s" in lost.error) for lost in pool.lost] == [(hung.replica, True)]

    def test_a_unit_within_its_lease_is_left_alone(self) -> None:
        pool = bench(replicas=1, fates={(0, 1): "slow x9.9"}, lease_s=10, straggler_factor=0).run(work(2))
        assert pool.done == [0, 1]
        assert not pool.lost

    def test_the_time_in_a_window_behind_another_unit_is_not_part_of_the_lease(self) -> None:
        pool = bench(replicas=1, in_flight=3, fates=every_run(range(20), "slow x8"), lease_s=10).run(work(20))
        assert pool.done == list(range(20))
        assert not pool.lost

    def test_a_unit_that_hangs_every_time_is_parked(self) -> None:
        pool = bench(replicas=2, fates=every_run([3], "hang"), lease_s=10, max_attempts=2).run(work(8))
        assert pool.failed == [3]
        assert pool.done == [0, 1, 2, 4, 5, 6, 7]
        assert len(pool.attempts(3)) == 2

    def test_the_answer_of_a_unit_counts_when_only_the_driver_was_late(self) -> None:
        """The observer blocks for longer than the lease, while the answer is there in time."""
        pool = bench(replicas=2, lease_s=10, straggler_factor=0)

        def block(event: object) -> None:
            if isinstance(event, UnitStarted) and event.unit == 3:
                pool.backend.now += 60

        pool.run(work(8), on_event=block)
        assert pool.done == list(range(8))
        assert not pool.lost
        assert not pool.charged


class TestRetries:
    def test_a_unit_that_raises_goes_to_another_replica(self) -> None:
        pool = bench(replicas=2, fates={(2, 1): "raise"}).run(work(10))
        assert pool.done == list(range(10))
        assert pool.charged == {2: 1}
        first, second = pool.runs_of(2)
        assert first.replica != second.replica
        assert not pool.lost

    def test_a_unit_that_raises_stays_where_there_is_no_other_replica(self) -> None:
        pool = bench(replicas=1, fates={(2, 1): "raise"}).run(work(10))
        assert pool.done == list(range(10))

    def test_a_unit_does_not_wait_for_another_replica_that_hangs(self) -> None:
        fates = {(9, 1): "hang", (8, 1): "raise"}
        pool = bench(replicas=2, in_flight=1, fates=fates, lease_s=3600, straggler_factor=0).run(work(10))
        failed, again = pool.runs_of(8)
        hung = pool.runs_of(9)[0]
        assert hung.replica != failed.replica
        assert again.began < failed.began + 60
        assert pool.done == list(range(10))

    def test_poison_units_are_parked_with_their_error_and_all_others_are_done(self) -> None:
        fates = every_run([1, 7], "raise") | every_run([4], "die")
        pool = bench(replicas=2, fates=fates, max_attempts=3).run(work(30))
        assert pool.finished is True
        assert pool.failed == [1, 4, 7]
        assert pool.done == [unit for unit in range(30) if unit not in (1, 4, 7)]
        assert all(len(pool.runs_of(unit)) == 3 for unit in (1, 4, 7))
        errors = {event.unit: (event.attempts, event.error) for event in pool.events if hasattr(event, "attempts")}
        assert errors == {1: (3, "ValueError: unit 1 is broken"), 4: (3, DIED), 7: (3, "ValueError: unit 7 is broken")}

    def test_no_unit_is_charged_for_another_that_kills(self) -> None:
        pool = bench(replicas=1, in_flight=3, fates={(5, 1): "die", (11, 1): "die"}).run(work(20))
        assert pool.done == list(range(20))
        assert pool.charged == {5: 1, 11: 1}

    def test_a_death_after_the_write_runs_the_unit_again_with_the_same_outcome(self) -> None:
        pool = bench(replicas=2, fates={(3, 1): "die after write"}).run(work(8))
        assert pool.done == list(range(8))
        assert pool.backend.written[3] == 2
        assert pool.backend.writes[3] == value_of(3)

    def test_the_receipt_that_is_reported_is_that_of_the_worker(self) -> None:
        pool = bench(replicas=2, fates={(3, 1): "raise"}).run(work(5))
        receipts = {event.unit: event.receipt for event in pool.events if hasattr(event, "receipt")}
        assert receipts == {unit: value_of(unit) for unit in range(5)}


class TestPauses:
    def test_the_pause_before_a_restart_doubles_up_to_a_minute(self) -> None:
        pool = bench(replicas=1, fates=every_run(range(40), "die"), max_restarts=9, backoff_s=1).run(work(40))
        assert [lost.again_in_s for lost in pool.lost] == [1, 2, 4, 8, 16, 32, 60, 60, 60, None]
        deaths = pool.times(ReplicaLost)[:-1]
        asked = [time for time, _ in pool.backend.spawns[1:]]
        assert [ask - death for death, ask in zip(deaths, asked, strict=True)] == pytest.approx(
            [1, 2, 4, 8, 16, 32, 60, 60, 60]
        )

    def test_a_finished_unit_ends_the_row_of_losses(self) -> None:
        fates = {(unit, 1): "die" for unit in range(0, 40, 4)}
        pool = bench(replicas=1, in_flight=1, fates=fates, max_restarts=3, backoff_s=1).run(work(40))
        assert pool.done == list(range(40))
        assert len(pool.lost) == 10
        assert all(lost.again_in_s is not None and lost.again_in_s <= 4 for lost in pool.lost)

    def test_the_death_of_an_idle_replica_is_noticed_and_charges_nobody(self) -> None:
        pool = bench(replicas=2, kills=[(3.2, 1)], fates={(0, 1): "slow x20"}, straggler_factor=0).run(work(2))
        assert pool.done == [0, 1]
        assert [lost.replica for lost in pool.lost] == [1]
        assert not pool.charged


class TestBuilds:
    def test_a_factory_that_always_raises_ends_the_run_after_its_tries(self) -> None:
        pool = bench(replicas=1, builds=dict.fromkeys(range(1, 50), "raise"), max_attempts=3).run(work(5))
        assert isinstance(pool.error, ReplicaStartError)
        assert str(pool.error) == (
            "Replica 0 cannot start (tried 3 times): OSError: no weights. Repair the cause and run again."
        )
        assert pool.backend.builds == 3
        assert not pool.of(UnitStarted)

    def test_a_factory_that_always_kills_ends_the_run_after_its_restarts(self) -> None:
        pool = bench(replicas=1, builds=dict.fromkeys(range(1, 50), "die"), max_restarts=2).run(work(5))
        assert isinstance(pool.error, ReplicaStartError)
        assert str(pool.error).startswith(f"Replica 0 cannot start (tried 3 times): {DIED}.")
        assert pool.backend.builds == 3

    def test_a_factory_that_hangs_ends_the_run_in_time(self) -> None:
        pool = bench(replicas=1, builds={1: "hang"}, start_timeout_s=50).run(work(5))
        assert isinstance(pool.error, ReplicaStartError)
        assert "not built within start_timeout_s (50 s)" in str(pool.error)
        assert 50 <= pool.backend.now < 52

    def test_a_slow_factory_within_its_time_is_waited_for(self) -> None:
        pool = bench(replicas=1, builds={1: 49.0}, start_timeout_s=50).run(work(5))
        assert pool.done == list(range(5))

    def test_a_worker_that_was_built_in_time_counts_when_only_the_driver_was_late(self) -> None:
        pool = bench(replicas=2, builds={2: 4.0}, start_timeout_s=5)

        def block(event: object) -> None:
            if isinstance(event, UnitStarted) and event.unit == 3:
                pool.backend.now += 60

        pool.run(work(12), on_event=block)
        assert pool.done == list(range(12))
        assert [event.replica for event in pool.started] == [0, 1]
        assert not pool.lost

    @pytest.mark.parametrize("kind", ["raise", "die", "hang"])
    def test_a_factory_that_recovers_costs_nothing_but_time(self, kind: str) -> None:
        builds = {1: 0.5, 2: kind}
        pool = bench(replicas=2, builds=builds, start_timeout_s=5, fates=every_run(range(40), "slow x2")).run(work(40))
        assert pool.done == list(range(40))
        assert len(pool.lost) == 1
        assert sorted({event.replica for event in pool.started}) == [0, 1]
        assert not pool.charged

    @pytest.mark.parametrize("kind", ["raise", "die", "hang"])
    def test_a_replica_that_cannot_start_leaves_the_work_to_those_that_could(self, kind: str) -> None:
        builds = {1: 0.5} | dict.fromkeys(range(2, 99), kind)
        pool = bench(replicas=2, builds=builds, start_timeout_s=5, max_attempts=2, max_restarts=2).run(work(200))
        assert pool.done == list(range(200))
        assert [lost.replica for lost in pool.lost if lost.again_in_s is None] == [1]
        assert pool.backend.builds <= 1 + 3

    def test_a_failed_run_leaves_no_replica_and_the_next_one_starts_anew(self) -> None:
        pool = bench(replicas=1, builds={1: "raise"}, max_attempts=1).run(work(5))
        assert isinstance(pool.error, ReplicaStartError)
        assert pool.backend.alive == {}
        pool.run(work(5))
        assert pool.done == list(range(5))


class TestBadReplicas:
    def test_a_bad_node_is_given_up_and_its_units_are_done_elsewhere(self) -> None:
        nodes = [Node(name="good", places=1), Node(name="bad", places=1, fate="die")]
        pool = bench(nodes, replicas=2, max_restarts=3, backoff_s=0.1).run(work(200))
        assert pool.done == list(range(200))
        assert not pool.failed
        assert [lost.again_in_s is None for lost in pool.lost] == [False, False, False, True]
        assert max(pool.charged.values()) == 1

    def test_a_node_on_which_everything_raises_parks_nothing(self) -> None:
        nodes = [Node(name="good", places=1), Node(name="bad", places=1, fate="raise")]
        pool = bench(nodes, replicas=2, max_attempts=2).run(work(50))
        assert pool.done == list(range(50))
        assert not pool.failed

    @pytest.mark.parametrize("in_flight", [1, 2, 3])
    @pytest.mark.parametrize("replicas", [1, 3])
    def test_more_different_units_than_restarts_in_a_row_end_the_run_and_park_nothing(
        self, replicas: int, in_flight: int
    ) -> None:
        pool = bench(
            replicas=replicas,
            in_flight=in_flight,
            fates=every_run(range(3, 500), "die"),
            max_restarts=5,
            max_attempts=3,
            backoff_s=0.1,
        ).run(work(500))
        assert type(pool.error) is PoolError
        assert str(pool.error).startswith(f"No replica is left: all {replicas} were lost, the last with {DIED}.")
        assert "max_restarts (5)" in str(pool.error)
        assert pool.done == [0, 1, 2]
        assert not pool.failed
        assert set(pool.charged.values()) == {1}

    def test_few_units_that_kill_the_last_replica_are_parked_and_the_run_goes_on(self) -> None:
        """Five different units kill three times each: 15 losses, but never more than max_restarts units."""
        bad = [3, 4, 5, 6, 7]
        pool = bench(replicas=1, fates=every_run(bad, "die"), max_restarts=5, backoff_s=0.1).run(work(20))
        assert pool.finished is True
        assert pool.failed == bad
        assert pool.done == [unit for unit in range(20) if unit not in bad]
        assert all(len(pool.runs_of(unit)) == 3 for unit in bad)

    def test_units_that_raise_in_a_row_take_no_replica_along(self) -> None:
        pool = bench(replicas=1, fates=every_run(range(12), "raise"), max_restarts=1).run(work(20))
        assert pool.failed == list(range(12))
        assert pool.done == list(range(12, 20))


class TestHalts:
    def test_an_error_that_would_meet_every_unit_ends_the_run_and_charges_nothing(self) -> None:
        pool = bench(replicas=2, in_flight=2, fates={(4, 1): "halt"}).run(work(20))
        assert isinstance(pool.error, PoolHaltedError)
        assert str(pool.error) == "OSError: disk full"
        assert not pool.failed
        assert not pool.charged
        assert [event.error for event in pool.of(UnitRetried) if event.unit == 4] == ["not charged: OSError: disk full"]
        assert pool.backend.alive == {}

    def test_what_runs_beside_a_halting_unit_still_finishes(self) -> None:
        fates = {(0, 1): "halt", (1, 1): "slow x5"}
        pool = bench(replicas=2, in_flight=1, fates=fates, drain_s=30).run(work(20))
        assert pool.done == [1]
        assert pool.backend.now < 10

    def test_a_halt_is_no_error_when_every_unit_has_ended(self) -> None:
        """The slow original of unit 7, which a copy has finished, finds the disk full while unit 6 still runs."""
        fates = {(7, 1): "slow x9 halt", (6, 1): "slow x12", (6, 2): "slow x20"}
        pool = bench(replicas=4, in_flight=1, fates=fates, straggler_factor=2).run(work(8))
        assert len(pool.runs_of(7)) == 2
        assert pool.times(UnitDone)[-1] > pool.runs_of(7)[0].began + 9
        assert (pool.finished, pool.error) == (True, None)
        assert pool.done == list(range(8))

    def test_a_halted_pool_runs_again(self) -> None:
        pool = bench(replicas=2, fates={(4, 1): "halt"}).run(work(10))
        before = pool.done
        pool.run([unit for unit in work(10) if unit.id not in before])
        assert pool.finished is True
        assert pool.done == list(range(10))


class TestRuns:
    def test_replicas_stay_up_between_runs(self) -> None:
        pool = bench(replicas=2)
        pool.run(work(8)).run(work(8, first=8))
        assert pool.done == list(range(16))
        assert pool.backend.builds == 2
        assert pool.of(ReplicaStarted) == [ReplicaStarted(replica=0), ReplicaStarted(replica=1)]

    def test_a_replica_that_dies_between_runs_is_replaced(self) -> None:
        pool = bench(replicas=1, kills=[(10.0, 0)])
        pool.run(work(2))
        pool.backend.now = 20.0
        pool.run(work(2, first=2))
        assert pool.done == [0, 1, 2, 3]
        assert pool.backend.builds == 2

    def test_a_worker_that_is_still_being_built_when_a_run_ends_serves_the_next(self) -> None:
        pool = bench(replicas=2, builds={2: 8.0}, start_timeout_s=10)
        pool.run(work(2))
        pool.backend.now += 100
        pool.run(work(30, first=2))
        assert pool.done == list(range(32))
        assert not pool.lost
        assert {event.replica for event in pool.started} == {0, 1}

    def test_no_units_ask_for_no_replica(self) -> None:
        pool = bench(replicas=2).run([])
        assert pool.finished is True
        assert pool.backend.spawns == []
        assert pool.events == []

    def test_an_error_of_the_observer_leaves_the_run_and_kills_the_replicas(self) -> None:
        def fail(event: object) -> None:
            if isinstance(event, UnitStarted) and event.unit == 3:
                raise OSError("journal is gone")

        pool = bench(replicas=2)
        with pytest.raises(OSError, match="journal is gone"):
            pool.run(work(10), on_event=fail)
        assert pool.backend.alive == {}

    def test_a_given_up_replica_gets_another_chance_in_the_next_run(self) -> None:
        builds = {1: 0.5} | dict.fromkeys(range(2, 5), "raise")
        pool = bench(replicas=2, builds=builds, max_attempts=3, backoff_s=0.1).run(work(30))
        assert [event.replica for event in pool.started] == [0]
        pool.run(work(30, first=30))
        assert sorted(event.replica for event in pool.started) == [0, 1]

    def test_the_pool_waits_without_spinning(self) -> None:
        """One long unit, replicas that are not wanted, one that waits for a place: about one look a second."""
        pool = bench([Node(places=2)], replicas=8, fates={(0, 1): "slow x1000"}, idle_release_s=10).run(work(3))
        assert pool.done == [0, 1, 2]
        assert pool.backend.waits < 1.2 * pool.backend.now
