"""Second copies of the last units: when they start, who wins, and what is counted."""

from __future__ import annotations

from collections import Counter

import pytest

from cluster import ReplicaReleased, UnitDone, UnitFailed, UnitRetried, UnitStarted
from tests.fake_pool import Bench, Node, bench, every_run, work


def copies(pool: Bench) -> list[UnitStarted]:
    return [event for event in pool.of(UnitStarted) if event.copy]


def ended_once(pool: Bench, units: int) -> bool:
    ends = Counter(event.unit for event in pool.of(UnitDone, UnitFailed))
    return sorted(ends) == list(range(units)) and set(ends.values()) == {1}


class TestWhen:
    def test_a_straggler_near_the_end_is_copied_by_an_idle_replica(self) -> None:
        pool = bench(replicas=3, fates={(11, 1): "slow x100"}, straggler_factor=3).run(work(12))
        (copy,) = copies(pool)
        original, second = pool.runs_of(11)
        assert (copy.unit, copy.attempt) == (11, 1)
        assert copy.replica == second.replica != original.replica
        assert second.began == pytest.approx(original.began + 3)
        assert ended_once(pool, 12)
        assert pool.backend.now < 12

    def test_a_unit_that_is_large_is_no_straggler(self) -> None:
        units = [*work(11), *work(1, first=11)]
        units[-1] = type(units[-1])(11, 0, 11, weight=20.0)
        pool = bench(replicas=3, weights={11: 20.0}, straggler_factor=3).run(units)
        assert not copies(pool)
        assert len(pool.runs_of(11)) == 1
        assert ended_once(pool, 12)

    def test_a_large_unit_straggles_by_its_own_measure(self) -> None:
        units = [*work(11), type(work(1)[0])(11, 0, 11, weight=4.0)]
        pool = bench(replicas=3, weights={11: 4.0}, fates={(11, 1): "slow x10"}, straggler_factor=3).run(units)
        original, second = pool.runs_of(11)
        assert second.began == pytest.approx(original.began + 12)

    def test_units_without_weight_say_nothing_of_the_pace(self) -> None:
        units = [type(unit)(unit.id, 0, unit.id, weight=float(unit.id >= 20)) for unit in work(30)]
        pool = bench(replicas=3, weights=dict.fromkeys(range(20), 0.1), straggler_factor=3).run(units)
        assert not copies(pool)
        assert ended_once(pool, 30)

    def test_nothing_is_copied_while_units_wait(self) -> None:
        pool = bench(replicas=2, in_flight=1, fates={(5, 1): "slow x60"}, straggler_factor=2).run(work(40))
        (copy,) = copies(pool)
        starts = [event for event in pool.of(UnitStarted) if not event.copy]
        assert pool.events.index(copy) > pool.events.index(starts[-1])

    @pytest.mark.parametrize("fate", ["slow x600", "hang"])
    def test_a_unit_that_waits_behind_a_straggler_goes_to_an_idle_replica(self, fate: str) -> None:
        """Unit 7 waits in the window of the replica that runs unit 5, and has not started there."""
        pool = bench(replicas=2, in_flight=2, fates={(5, 1): fate}, straggler_factor=2).run(work(40))
        assert ended_once(pool, 40)
        assert pool.backend.now < 60
        assert [copy.unit for copy in copies(pool)] == [5]
        assert all(len(pool.attempts(unit)) == 1 for unit in range(40))
        assert not pool.charged

    def test_nothing_is_copied_before_a_pace_is_known(self) -> None:
        pool = bench(replicas=4, fates={(0, 1): "slow x50"}, straggler_factor=2).run(work(4))
        assert not copies(pool)
        assert ended_once(pool, 4)

    def test_a_factor_of_zero_never_copies(self) -> None:
        pool = bench(replicas=3, fates={(11, 1): "slow x100"}, straggler_factor=0).run(work(12))
        assert not copies(pool)
        assert ended_once(pool, 12)

    def test_only_one_copy_of_a_unit_runs_and_others_wait_idle(self) -> None:
        pool = bench(replicas=6, fates=every_run([23], "slow x30"), straggler_factor=2).run(work(24))
        assert len(copies(pool)) == 1
        assert len(pool.runs_of(23)) == 2

    def test_the_worst_straggler_is_copied_first(self) -> None:
        fates = {(10, 1): "slow x40", (11, 1): "slow x40"}
        pool = bench(replicas=3, in_flight=1, fates=fates, straggler_factor=3).run(work(12))
        began = {unit: pool.runs_of(unit)[0].began for unit in (10, 11)}
        assert [copy.unit for copy in copies(pool)] == sorted(began, key=lambda unit: (began[unit], unit))


class TestHardware:
    def test_a_unit_is_not_copied_to_other_hardware(self) -> None:
        nodes = [Node(name="a", hardware="A100"), Node(name="h", hardware="H100")]
        pool = bench(nodes, replicas=2, fates={(11, 1): "slow x30"}, straggler_factor=2).run(work(12))
        assert not copies(pool)
        assert ended_once(pool, 12)

    def test_equal_hardware_is_found_among_several(self) -> None:
        nodes = [
            Node(name="h", hardware="H100", places=2),
            Node(name="a", hardware="A100", places=1),
            Node(name="b", hardware="A100", places=1),
        ]
        fates = every_run([15], "slow x30", runs=1)
        pool = bench(nodes, replicas=4, in_flight=1, fates=fates, straggler_factor=2).run(work(16))
        original, second = pool.runs_of(15)
        names = {node.name: node.hardware for node in nodes}
        assert original.node != second.node or names[original.node] == "H100"
        assert names[original.node] == names[second.node]


class TestWhoWins:
    def test_the_first_answer_wins_and_the_loser_is_ignored(self) -> None:
        """Unit 11's original answers while unit 10 still runs; it must not be counted a second time."""
        fates = {(11, 1): "slow x8", (10, 1): "slow x15", (10, 2): "slow x15"}
        pool = bench(replicas=4, in_flight=1, fates=fates, straggler_factor=3).run(work(12))
        assert ended_once(pool, 12)
        assert pool.backend.written[11] == 2
        (done,) = [event for event in pool.of(UnitDone) if event.unit == 11]
        assert (done.attempt, done.replica) == (1, pool.runs_of(11)[1].replica)

    def test_the_original_may_win(self) -> None:
        fates = {(11, 1): "slow x4", (11, 2): "slow x30", (10, 1): "slow x20", (10, 2): "slow x20"}
        pool = bench(replicas=4, in_flight=1, fates=fates, straggler_factor=3).run(work(12))
        (done,) = [event for event in pool.of(UnitDone) if event.unit == 11]
        assert done.replica == pool.runs_of(11)[0].replica
        assert ended_once(pool, 12)

    def test_a_copy_is_no_attempt(self) -> None:
        """The first two runs of the unit, one of them a copy, make one attempt; the third run is the second."""
        fates = {(11, 1): "slow x5 raise", (11, 2): "slow x2.5 raise", (11, 3): "done"}
        pool = bench(replicas=2, fates=fates, straggler_factor=3, max_attempts=2).run(work(12))
        assert pool.done == list(range(12))
        assert [event.attempt for event in pool.attempts(11)] == [1, 2]
        assert pool.charged == {11: 1}

    def test_a_copy_becomes_the_attempt_when_the_original_dies(self) -> None:
        fates = {(11, 1): "slow x5 die", (11, 2): "slow x3"}
        pool = bench(replicas=2, in_flight=1, fates=fates, straggler_factor=3, max_attempts=1).run(work(12))
        assert pool.done == list(range(12))
        assert not pool.of(UnitRetried)
        assert [(lost.replica) for lost in pool.lost] == [pool.runs_of(11)[0].replica]

    def test_a_copy_becomes_the_attempt_when_the_original_raises(self) -> None:
        fates = {(11, 1): "slow x5 raise", (11, 2): "slow x3"}
        pool = bench(replicas=2, in_flight=1, fates=fates, straggler_factor=3, max_attempts=1).run(work(12))
        assert pool.done == list(range(12))
        assert not pool.charged

    def test_a_promoted_copy_that_fails_is_charged_once(self) -> None:
        fates = {(11, 1): "slow x5 raise", (11, 2): "slow x3 raise"}
        pool = bench(replicas=2, in_flight=1, fates=fates, straggler_factor=3, max_attempts=1).run(work(12))
        assert pool.failed == [11]
        assert len(pool.attempts(11)) == 1
        assert ended_once(pool, 12)

    @pytest.mark.parametrize("fate", ["raise", "die"])
    def test_a_copy_that_fails_leaves_the_original_and_is_not_repeated(self, fate: str) -> None:
        fates = {(11, 1): "slow x60"} | {(11, run): fate for run in range(2, 90)}
        pool = bench(replicas=3, fates=fates, straggler_factor=2, backoff_s=0.1).run(work(12))
        assert pool.done == list(range(12))
        assert len(copies(pool)) == 1
        assert not pool.charged
        assert not pool.failed

    def test_a_hung_original_costs_no_lease_once_its_copy_is_done(self) -> None:
        pool = bench(replicas=2, fates={(11, 1): "hang"}, straggler_factor=3, lease_s=3600).run(work(12))
        assert pool.done == list(range(12))
        assert pool.backend.now < 20
        assert not pool.charged


class TestAfterwards:
    def test_a_loser_that_still_runs_is_not_in_the_way_of_the_next_run(self) -> None:
        pool = bench(replicas=2, fates={(11, 1): "slow x500"}, straggler_factor=3, lease_s=50).run(work(12))
        loser = pool.runs_of(11)[0].replica
        assert [(event.replica, event.reason) for event in pool.of(ReplicaReleased)] == [
            (loser, "a copy of its unit was faster")
        ]
        before = pool.backend.now
        pool.run(work(12, first=12))
        assert pool.done == list(range(24))
        assert pool.backend.now < before + 12
        assert not pool.lost

    def test_a_copy_is_not_started_while_the_run_is_stopped(self) -> None:
        pool = bench(replicas=2, fates={(11, 1): "slow x100"}, straggler_factor=3, drain_s=20)
        pool.run(work(12), stop=lambda: "enough" if len(pool.done) == 11 else None)
        assert pool.finished is False
        assert not copies(pool)
        assert pool.done == list(range(11))
