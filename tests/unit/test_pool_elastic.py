"""Replicas that come and go with work and nodes, where units run, and how far ahead they are pulled."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest

from cluster import PoolError, PoolOptions, PoolWaiting, ReplicaReleased, ReplicaStarted, UnitDone, UnitStarted
from pipeline.config import RunConfig
from tests.fake_pool import BUILD_S, PLACE_S, Node, bench, counted, every_run, work


class TestGrowth:
    def test_no_more_replicas_than_units_are_asked_for(self) -> None:
        pool = bench(replicas=8).run(work(3))
        assert pool.backend.most_alive == 3
        assert pool.done == [0, 1, 2]

    def test_a_replica_joins_when_its_node_comes(self) -> None:
        nodes = [Node(name="a"), Node(name="b", joins=10, places=2)]
        pool = bench(nodes, replicas=3, in_flight=1).run(work(60))
        assert pool.done == list(range(60))
        assert pool.times(ReplicaStarted) == pytest.approx([PLACE_S + BUILD_S, 10 + BUILD_S, 10 + BUILD_S])
        assert {run.node for run in pool.backend.runs if run.began > 11} == {"a", "b"}
        assert pool.backend.now < 35

    def test_a_request_that_work_no_longer_needs_is_withdrawn(self) -> None:
        nodes = [Node(name="a"), Node(name="b", joins=12)]
        pool = bench(nodes, replicas=2, fates={(9, 1): "slow x20"}, in_flight=1, straggler_factor=0).run(work(10))
        assert pool.done == list(range(10))
        assert pool.backend.builds == 1

    def test_a_withdrawn_request_is_made_again_when_a_second_run_has_work(self) -> None:
        pool = bench([Node(name="a"), Node(name="b", joins=30)], replicas=2)
        pool.run(work(4))
        pool.backend.now = 40.0
        pool.run(work(20, first=4))
        assert {event.replica for event in pool.started} == {0, 1}

    def test_the_pool_never_exceeds_its_size(self) -> None:
        pool = bench([Node(places=50)], replicas=4, fates={(unit, 1): "die" for unit in range(0, 90, 9)}).run(work(90))
        assert pool.backend.most_alive == 4
        assert pool.done == list(range(90))


class TestRelease:
    def test_idle_replicas_are_released_but_for_one_that_may_copy(self) -> None:
        fates = {(0, 1): "slow x50"}
        pool = bench(replicas=4, fates=fates, idle_release_s=10, straggler_factor=20).run(work(4))
        assert len(pool.released) == 2
        assert pool.released[0].reason == "idle for 10 s"
        assert pool.times(ReplicaReleased)[0] == pytest.approx(1.6 + 10)

    def test_without_copies_no_idle_replica_stays_beside_busy_ones(self) -> None:
        fates = {(0, 1): "slow x50"}
        pool = bench(replicas=4, fates=fates, idle_release_s=10, straggler_factor=0).run(work(4))
        assert len(pool.released) == 3
        assert pool.done == [0, 1, 2, 3]

    def test_busy_replicas_are_never_released(self) -> None:
        pool = bench(replicas=2, fates=every_run(range(6), "slow x30"), idle_release_s=5).run(work(6))
        assert not pool.released

    def test_a_released_replica_comes_back_with_new_work(self) -> None:
        pool = bench(replicas=3, fates={(0, 1): "slow x30"}, idle_release_s=5, straggler_factor=0).run(work(3))
        assert len(pool.released) == 2
        pool.run(work(9, first=3))
        assert pool.backend.most_alive == 3
        assert len(pool.started) == 5

    def test_a_released_place_is_free_at_once(self) -> None:
        pool = bench([Node(places=3)], replicas=3, fates={(0, 1): "slow x30"}, idle_release_s=5, straggler_factor=0)
        seen: list[int] = []
        pool.run(work(3), on_event=lambda event: seen.append(len(pool.backend.alive)))
        assert len(pool.released) == 2
        assert seen[-1] == 1


class TestPlaces:
    def test_no_place_ever_is_an_error_in_time_with_the_numbers(self) -> None:
        pool = bench([], replicas=4, capacity_wait_s=15).run(work(20))
        assert type(pool.error) is PoolError
        assert str(pool.error) == (
            "The cluster cannot hold the pool: a replica asks for 1 place, the cluster has 0 on 0 node(s), after 15 s. "
            "Ask for smaller replicas, add nodes, or raise capacity_wait_s where an autoscaler adds them."
        )
        assert 15 <= pool.backend.now <= 16
        assert pool.backend.alive == {}

    def test_the_default_patience_ends_within_half_a_minute(self) -> None:
        assert max(PoolOptions().capacity_wait_s, RunConfig().capacity_wait_s) + 1 < 30
        pool = bench([], replicas=1).run(work(20))
        assert isinstance(pool.error, PoolError)
        assert pool.backend.now < 30

    def test_a_node_that_comes_in_time_is_waited_for(self) -> None:
        pool = bench([Node(joins=14)], replicas=1, capacity_wait_s=15).run(work(3))
        assert pool.done == [0, 1, 2]

    def test_a_place_that_others_hold_is_waited_for_without_end(self) -> None:
        pool = bench([Node(taken_until=7200)], replicas=1, capacity_wait_s=15).run(work(3))
        assert pool.done == [0, 1, 2]
        waits = [event.seconds for event in pool.of(PoolWaiting)]
        assert waits[0] >= 5
        assert all(later >= 2 * earlier for earlier, later in itertools.pairwise(waits))
        assert len(waits) == math.floor(math.log2(7200 / 5)) + 1

    def test_an_ordinary_start_is_not_told_as_waiting(self) -> None:
        pool = bench(replicas=2, builds={1: 60.0, 2: 90.0}).run(work(8))
        assert not pool.of(PoolWaiting)

    def test_one_place_is_enough_for_a_pool_that_asks_for_more(self) -> None:
        pool = bench([Node(places=1)], replicas=5, capacity_wait_s=5).run(work(50))
        assert pool.done == list(range(50))
        assert pool.error is None

    def test_a_cluster_that_loses_all_its_nodes_for_good_ends_the_run(self) -> None:
        pool = bench([Node(leaves=5.0, places=2)], replicas=2, capacity_wait_s=15).run(work(50))
        assert "The cluster cannot hold the pool" in str(pool.error)
        assert pool.done == list(range(len(pool.done)))
        assert not pool.failed
        assert pool.backend.now < 5 + 60


class TestLostNodes:
    def test_units_of_a_lost_node_are_done_on_the_others(self) -> None:
        nodes = [Node(name="a", places=2), Node(name="b", places=2, leaves=4.2)]
        pool = bench(nodes, replicas=4).run(work(60))
        assert pool.done == list(range(60))
        assert sorted(pool.charged.values()) == [1, 1]
        assert {run.node for run in pool.backend.runs if run.began > 4.2} == {"a"}

    def test_a_cluster_of_nodes_that_come_and_go_does_everything_once(self) -> None:
        nodes = [Node(name=f"n{index}", joins=7.0 * index, leaves=7.0 * index + 9.3) for index in range(40)]
        pool = bench(nodes, replicas=3, max_attempts=5).run(work(100))
        assert pool.done == list(range(100))
        assert max(pool.charged.values()) <= 2

    def test_a_node_that_dies_while_a_worker_is_built_charges_nobody(self) -> None:
        nodes = [Node(name="a", leaves=0.3), Node(name="b", joins=3)]
        pool = bench(nodes, replicas=1).run(work(5))
        assert pool.done == list(range(5))
        assert not pool.charged


class TestNotices:
    def test_the_running_unit_finishes_and_the_others_go_elsewhere_uncharged(self) -> None:
        nodes = [Node(name="a", notice=2.0, leaves=30.0), Node(name="b")]
        pool = bench(nodes, replicas=2, in_flight=2).run(work(20))
        assert pool.done == list(range(20))
        assert not pool.lost
        assert not pool.charged
        assert not [run for run in pool.backend.runs if run.node == "a" and run.began > 2.0]
        assert [(event.replica, event.reason) for event in pool.released] == [(0, "node a will go")]
        assert max(pool.backend.written.values()) == 1

    def test_the_replica_is_started_again_on_another_node(self) -> None:
        nodes = [Node(name="a", notice=2.0), Node(name="b"), Node(name="c", joins=2.5)]
        pool = bench(nodes, replicas=2).run(work(30))
        assert {run.node for run in pool.backend.runs if run.began > 4} == {"b", "c"}
        assert len(pool.started) == 3

    def test_a_node_that_has_been_told_is_shunned(self) -> None:
        nodes = [Node(name="a", places=4, notice=2.0), Node(name="b", places=1)]
        pool = bench(nodes, replicas=2).run(work(30))
        assert pool.done == list(range(30))
        assert {run.node for run in pool.backend.runs if run.began > 2} == {"b"}

    def test_a_notice_while_the_worker_is_built_moves_the_replica(self) -> None:
        nodes = [Node(name="a", notice=0.3), Node(name="b", joins=1.0)]
        pool = bench(nodes, replicas=1).run(work(5))
        assert pool.done == list(range(5))
        assert {run.node for run in pool.backend.runs} == {"b"}
        assert not pool.lost

    def test_a_node_that_goes_before_the_unit_finishes_charges_that_unit_alone(self) -> None:
        nodes = [Node(name="a", notice=0.7, leaves=3.0), Node(name="b", joins=3.5)]
        pool = bench(nodes, replicas=1, in_flight=3, fates={(0, 1): "slow x10"}).run(work(9))
        assert pool.done == list(range(9))
        assert pool.charged == {0: 1}

    def test_a_replica_that_dies_after_the_notice_is_not_started_on_that_node_again(self) -> None:
        nodes = [Node(name="a", notice=0.7, places=2), Node(name="b", joins=8)]
        pool = bench(nodes, replicas=1, fates={(0, 1): "slow x10"}, kills=[(3.0, 0)]).run(work(9))
        assert pool.done == list(range(9))
        assert [run.node for run in pool.backend.runs] == ["a"] + ["b"] * 9
        assert not pool.released

    @pytest.mark.parametrize("notice", [0.3, 2.5], ids=["while it builds", "while it is idle"])
    def test_a_death_heard_together_with_the_notice_is_no_loss(self, notice: float) -> None:
        nodes = [Node(name="a", notice=notice, leaves=notice + 0.1), Node(name="b", joins=1.0)]
        fates = {(1, 1): "slow x9"} if notice > 1 else {}
        pool = bench(nodes, replicas=2 if notice > 1 else 1, fates=fates, linger_s=0.5, straggler_factor=9)
        pool.run(work(2))
        assert pool.done == [0, 1]
        assert not pool.lost
        assert [event.reason for event in pool.released] == ["node a will go"]

    def test_notices_on_every_node_end_the_run_when_none_is_left(self) -> None:
        pool = bench([Node(notice=2.2)], replicas=1, capacity_wait_s=10).run(work(9))
        assert "The cluster cannot hold the pool" in str(pool.error)
        assert pool.done == [0, 1]
        assert not pool.charged


class TestLocality:
    def test_units_of_a_locality_stay_on_one_replica(self) -> None:
        pool = bench(replicas=3).run(work(30, locality=lambda unit: unit // 10))
        # Until one of them has nothing of its own any more, each serves one.
        served = {(run.unit // 10, run.replica) for run in pool.backend.runs if run.began < 8}
        assert len(served) == len({locality for locality, _ in served}) == 3
        assert pool.done == list(range(30))

    def test_a_replica_takes_up_the_locality_of_a_lost_one(self) -> None:
        pool = bench(replicas=2, fates={(1, 1): "die"}, in_flight=1, backoff_s=50).run(
            work(12, locality=lambda unit: unit % 2)
        )
        assert pool.done == list(range(12))
        # The other one first finishes what is its own.
        after = [run.unit % 2 for run in sorted(pool.backend.runs, key=lambda run: run.began) if run.replica == 0]
        assert after == sorted(after)

    def test_more_localities_than_replicas_are_served_one_after_the_other(self) -> None:
        pool = bench(replicas=1).run(work(24, locality=lambda unit: unit // 4))
        assert [run.unit for run in pool.backend.runs] == list(range(24))


class TestLazyPulling:
    @pytest.mark.parametrize(("replicas", "in_flight"), [(1, 1), (1, 4), (3, 2)])
    def test_units_are_pulled_as_they_are_needed(self, replicas: int, in_flight: int) -> None:
        progress: Counter[str] = Counter()

        def watch(event: object) -> None:
            progress["done"] += isinstance(event, UnitDone)
            assert progress["pulled"] - progress["done"] <= (4 + 1) * replicas * in_flight

        pool = bench(replicas=replicas, in_flight=in_flight, max_restarts=3)
        pool.run(counted(work(200), progress), on_event=watch)
        assert progress == {"pulled": 200, "done": 200}

    def test_nothing_is_pulled_once_the_run_is_told_to_stop(self) -> None:
        progress: Counter[str] = Counter()
        pool = bench(replicas=2)
        pool.run(counted(work(200), progress), stop=lambda: "enough" if pool.backend.now > 5 else None)
        assert pool.finished is False
        assert progress["pulled"] < 40

    def test_an_error_of_the_iterable_leaves_the_run_and_kills_the_replicas(self) -> None:
        def source():
            yield from work(30)
            raise RuntimeError("plan is broken")

        pool = bench(replicas=2)
        with pytest.raises(RuntimeError, match="plan is broken"):
            pool.run(source())
        assert pool.backend.alive == {}

    def test_two_units_of_one_id_are_refused(self) -> None:
        pool = bench(replicas=2)
        with pytest.raises(ValueError, match="Two units share an id: 1"):
            pool.run([*work(2), *work(2, first=1)])
        assert not pool.of(UnitStarted)
