"""The life of replicas, asked one step at a time."""

from __future__ import annotations

import math

import pytest

from cluster import Event, PoolError, PoolOptions, ReplicaLost, ReplicaStarted, ReplicaStartError
from cluster.fleet import Fleet, State
from tests.fake_pool import FakeBackend, Node


class Stage:
    """A fleet on a fake backend of which nobody hears the answers, so that the test gives them."""

    def __init__(self, **options: float) -> None:
        self.backend = FakeBackend([Node(places=100)])
        self.fleet = Fleet(self.backend, PoolOptions(**options), lambda: self.backend.now)  # type: ignore[arg-type]
        self.events: list[Event] = []
        self.fleet.begin()

    def resize(self, demand: int) -> list[State]:
        self.fleet.resize(demand, self.events.append)
        return self.states

    def start(self, replica: int) -> None:
        self.fleet.placed(replica)
        self.fleet.built(replica, "", self.events.append)

    @property
    def states(self) -> list[State]:
        return [self.fleet.slot(index).state for index in range(len(self.fleet._slots))]


@pytest.mark.parametrize(("demand", "placing"), [(0, 0), (2, 2), (3, 3), (99, 3)])
def test_as_many_are_asked_for_as_have_work_up_to_the_size(demand: int, placing: int) -> None:
    states = Stage(replicas=3).resize(demand)
    assert states == [State.PLACING] * placing + [State.ABSENT] * (3 - placing)


def test_requests_are_withdrawn_from_the_last_and_running_replicas_stay() -> None:
    stage = Stage(replicas=4)
    stage.resize(4)
    stage.start(0)
    stage.start(3)
    assert stage.resize(1) == [State.UP, State.ABSENT, State.ABSENT, State.UP]
    assert stage.resize(3) == [State.UP, State.PLACING, State.ABSENT, State.UP]


def test_a_place_heard_of_after_the_worker_changes_nothing() -> None:
    stage = Stage(replicas=1)
    stage.resize(1)
    stage.fleet.built(0, "gpu", stage.events.append)
    stage.fleet.placed(0)
    assert stage.states == [State.UP]
    stage.backend.now = 1e9
    assert stage.fleet.late() == []


def test_a_replica_is_late_only_from_its_place_on() -> None:
    stage = Stage(replicas=1, start_timeout_s=10)
    stage.resize(1)
    stage.backend.now = 100.0
    assert stage.fleet.late() == []
    stage.fleet.placed(0)
    stage.backend.now = 109.0
    assert stage.fleet.late() == []
    stage.backend.now = 110.0
    assert stage.fleet.late() == [0]


def test_a_lost_replica_waits_for_its_pause() -> None:
    stage = Stage(replicas=1, backoff_s=4)
    stage.resize(1)
    stage.start(0)
    stage.fleet.died(0, "gone", [7], stage.events.append)
    assert stage.events[-1] == ReplicaLost(replica=0, error="gone", again_in_s=4)
    assert stage.resize(1) == [State.ABSENT]
    assert stage.fleet.next_due(after=0.0) == 4.0
    stage.backend.now = 4.0
    assert stage.resize(1) == [State.PLACING]


def test_what_is_due_and_not_wanted_is_no_next_thing_to_do() -> None:
    stage = Stage(replicas=3, idle_release_s=60)
    stage.resize(1)
    assert stage.fleet.next_due(after=0.0) <= PoolOptions().capacity_wait_s
    stage.start(0)
    stage.resize(1)
    assert stage.fleet.next_due(after=0.0) == 60.0
    assert stage.fleet.next_due(after=60.0) == math.inf


def test_a_replica_that_is_lost_too_often_while_others_live_is_given_up() -> None:
    stage = Stage(replicas=2, max_restarts=1, backoff_s=0)
    stage.resize(2)
    stage.start(0)
    stage.start(1)
    stage.fleet.died(1, "gone", [7], stage.events.append)
    stage.resize(2)
    stage.start(1)
    stage.fleet.died(1, "gone", [8], stage.events.append)
    assert stage.resize(2) == [State.UP, State.GIVEN_UP]
    assert stage.events[-1] == ReplicaLost(replica=1, error="gone", again_in_s=None)


def test_the_last_replica_survives_one_unit_that_kills_it_often() -> None:
    stage = Stage(replicas=1, max_restarts=1, backoff_s=0)
    for _ in range(5):
        stage.resize(1)
        stage.start(0)
        stage.fleet.died(0, "gone", [7], stage.events.append)
    assert stage.states == [State.ABSENT]


def test_the_last_replica_that_dies_without_a_unit_too_often_ends_the_run() -> None:
    stage = Stage(replicas=1, max_restarts=1, backoff_s=0)
    for _ in range(2):
        stage.resize(1)
        stage.start(0)
        stage.fleet.died(0, "gone", [], stage.events.append)
    with pytest.raises(PoolError, match="No replica is left: all 1 were lost, the last with gone"):
        stage.resize(1)


def test_a_replica_that_never_came_up_ends_the_run_with_its_tries() -> None:
    stage = Stage(replicas=2, max_restarts=1, backoff_s=0)
    stage.resize(2)
    stage.fleet.died(0, "gone", [], stage.events.append)
    stage.resize(2)
    with pytest.raises(ReplicaStartError, match=r"Replica 0 cannot start \(tried 2 times\): gone"):
        stage.fleet.died(0, "gone", [], stage.events.append)


def test_a_new_run_forgets_what_was_given_up() -> None:
    stage = Stage(replicas=1, max_restarts=0)
    stage.resize(1)
    stage.start(0)
    stage.fleet.died(0, "gone", [], stage.events.append)
    assert stage.states == [State.GIVEN_UP]
    stage.fleet.begin()
    assert stage.resize(1) == [State.PLACING]
    assert stage.events[0] == ReplicaStarted(replica=0)


def test_a_replica_that_leaves_is_replaced_in_a_free_slot_only() -> None:
    stage = Stage(replicas=2)
    stage.resize(1)
    stage.start(0)
    stage.fleet.slot(0).leaving = "told"
    assert stage.fleet.up == []
    assert stage.resize(2) == [State.UP, State.PLACING]
