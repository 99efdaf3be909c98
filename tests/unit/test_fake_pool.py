"""The fake backend keeps the protocol that it lets the pool be judged by, and fails a pool that breaks it."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.backend import Answer, BuildFailed, Built, Died, Finished, Leaving, Placed
from tests.fake_pool import FakeBackend, Node, value_of


def listen(backend: FakeBackend, seconds: float = 100.0) -> list[Answer]:
    """Wait so many seconds, whatever is answered."""
    answers, until = [], backend.now + seconds
    while backend.now < until:
        answers += backend.wait(until - backend.now)
    return answers


def started(replica: int = 0, **tables: Any) -> FakeBackend:
    backend = FakeBackend(**tables)
    backend.open()
    backend.spawn(replica)
    assert isinstance(listen(backend, 1.0)[-1], Built)
    return backend


def test_a_replica_is_placed_then_built_then_answers_in_the_order_sent() -> None:
    backend = started()
    for ticket, unit in enumerate([5, 2, 9]):
        backend.send(0, ticket, unit)
    answers = listen(backend)
    assert [answer.ticket for answer in answers if isinstance(answer, Finished)] == [0, 1, 2]
    assert [run.unit for run in backend.runs] == [5, 2, 9]
    assert [run.began for run in backend.runs] == [1.0, 2.0, 3.0]
    assert backend.writes == {unit: value_of(unit) for unit in (5, 2, 9)}


def test_no_answer_follows_a_kill() -> None:
    backend = started()
    backend.send(0, 1, 1)
    backend.kill(0)
    assert listen(backend) == []
    assert not backend.writes


def test_a_new_process_of_a_killed_replica_knows_nothing_of_the_old_one() -> None:
    backend = started()
    backend.send(0, 1, 1)
    backend.kill(0)
    backend.spawn(0)
    assert [type(answer) for answer in listen(backend)] == [Placed, Built]


@pytest.mark.parametrize(
    ("fate", "answers", "written"),
    [
        pytest.param("done", [Finished], True, id="done"),
        pytest.param("slow x3", [Finished], True, id="slow"),
        pytest.param("raise", [Finished], False, id="raises"),
        pytest.param("halt", [Finished], False, id="halts"),
        pytest.param("die", [Died], False, id="dies"),
        pytest.param("die after write", [Died], True, id="dies between write and receipt"),
        pytest.param("hang", [], False, id="hangs"),
    ],
)
def test_a_unit_does_what_its_table_says(fate: str, answers: list[type], written: bool) -> None:
    backend = started(fates={(4, 1): fate})
    backend.send(0, 1, 4)
    assert [type(answer) for answer in listen(backend)] == answers
    assert (4 in backend.writes) == written


def test_the_second_run_of_a_unit_has_a_fate_of_its_own() -> None:
    backend = started(fates={(4, 1): "raise"})
    backend.send(0, 1, 4)
    backend.send(0, 2, 4)
    outcomes = [answer.outcome.error for answer in listen(backend) if isinstance(answer, Finished)]
    assert outcomes == ["ValueError: unit 4 is broken", None]


def test_a_death_takes_the_units_behind_it_along() -> None:
    backend = started(fates={(4, 1): "die"})
    backend.send(0, 1, 4)
    backend.send(0, 2, 5)
    assert [type(answer) for answer in listen(backend)] == [Died]
    assert not backend.writes


@pytest.mark.parametrize(
    ("build", "answers"),
    [
        pytest.param(7.0, [Placed, Built], id="slow"),
        pytest.param("raise", [Placed, BuildFailed], id="raises"),
        pytest.param("die", [Placed, Died], id="dies"),
        pytest.param("hang", [Placed], id="hangs"),
    ],
)
def test_a_build_does_what_its_table_says(build: str | float, answers: list[type]) -> None:
    backend = FakeBackend(builds={1: build})
    backend.spawn(0)
    assert [type(answer) for answer in listen(backend)] == answers


def test_a_replica_waits_for_a_place_and_takes_the_next_free_one() -> None:
    backend = FakeBackend([Node(name="a"), Node(name="b", joins=50)])
    for replica in range(2):
        backend.spawn(replica)
    assert backend.capacity()[0] == 0
    listen(backend, 10)
    assert backend.capacity()[0] == 1
    assert backend.alive == {0: "a"}
    listen(backend, 50)
    assert backend.alive == {0: "a", 1: "b"}
    assert backend.capacity()[0] == 2


def test_a_node_that_leaves_takes_its_replicas_along() -> None:
    backend = started(nodes=[Node(leaves=20)])
    backend.send(0, 1, 1)
    assert [type(answer) for answer in listen(backend)] == [Finished, Died]
    assert backend.capacity()[0] == 0


def test_a_notice_lets_the_running_unit_finish_and_refuses_the_others() -> None:
    backend = started(nodes=[Node(name="a", notice=1.5), Node(name="b")])
    backend.send(0, 1, 1)
    backend.send(0, 2, 2)
    leaving, finished, refused = listen(backend)
    assert leaving == Leaving(replica=0, reason="node a will go")
    assert isinstance(finished, Finished)
    assert isinstance(refused, Finished)
    assert (finished.outcome.refused, refused.outcome.refused) == (False, True)
    assert 2 not in backend.writes


def test_a_node_that_is_shunned_is_used_no_more() -> None:
    backend = started(nodes=[Node(name="a")])
    backend.kill(0, shun_node=True)
    backend.spawn(0)
    assert listen(backend) == []
    assert backend.capacity()[0] == 0


def test_answers_that_linger_come_together_with_deaths_last() -> None:
    backend = FakeBackend(kills=[(1.6, 0)], linger_s=1.0, nodes=[Node(places=2)])
    backend.spawn(0)
    backend.spawn(1)
    listen(backend, 1.0)
    backend.send(1, 1, 1)
    assert [type(answer) for answer in backend.wait(10.0)] == [Finished, Died]


@pytest.mark.parametrize(
    "breach",
    [
        pytest.param(lambda backend: backend.spawn(0), id="asks twice for one replica"),
        pytest.param(lambda backend: (backend.spawn(1), backend.send(1, 1, 1)), id="sends before there is a worker"),
        pytest.param(lambda backend: (backend.send(0, 1, 1), backend.send(0, 1, 2)), id="uses a ticket twice"),
        pytest.param(lambda backend: [backend.spawn(index) for index in range(1, 4)], id="has too many replicas"),
        pytest.param(lambda backend: [backend.wait(0.0) for _ in range(20)], id="spins"),
        pytest.param(lambda backend: listen(backend, 1e4), id="does not end"),
    ],
)
def test_a_pool_that_breaks_the_protocol_fails(breach: Any) -> None:
    backend = started(most=3, limit_s=1e3)
    with pytest.raises(AssertionError):
        breach(backend)
