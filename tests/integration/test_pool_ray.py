"""The Ray pool: real processes that die at the attempts that a table names."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from cluster import (
    Event,
    Executor,
    PoolDraining,
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

ray = pytest.importorskip("ray")

from cluster import ray_pool  # noqa: E402
from cluster.backend import Built, Died, Finished, Leaving, Placed  # noqa: E402
from cluster.ray_pool import RayBackend, RayPool, places_on  # noqa: E402
from tests.faulty_worker import FaultyFactory, wait_for  # noqa: E402

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(autouse=True)
def light_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep torch out of the replicas: nnsight, once loaded, adds ``save`` to all classes, and Ray sends it along."""
    monkeypatch.setattr(ray_pool._Replica, "save", None, raising=False)


@dataclass
class Bench:
    """A pool under test with the events of its runs."""

    pool: RayPool
    events: list[Event]
    folder: Path

    def run(
        self,
        units: int,
        *,
        stop: Callable[[], str | None] = lambda: None,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> bool:
        def observe(event: Event) -> None:
            self.events.append(event)
            if isinstance(event, UnitStarted):
                (self.folder / f"started-{event.unit}").touch()
            on_event(event)

        return self.pool.run((WorkUnit(index, index // 4, index) for index in range(units)), observe, stop)

    def start_all(self, replicas: int) -> None:
        """Run throw-away units until every replica is up, as a run of short units may end before the last one is."""
        deadline = time.monotonic() + 60
        started: set[int] = set()

        def watch(event: Event) -> None:
            if isinstance(event, ReplicaStarted):
                started.add(event.replica)

        def source() -> Iterator[WorkUnit]:
            for index in itertools.count(1000):
                if len(started) == replicas:
                    return
                assert time.monotonic() < deadline
                yield WorkUnit(index, 0, 1000)

        self.pool.run(source(), watch)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def done(self) -> list[int]:
        return sorted(event.unit for event in self.of(UnitDone))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Make pools over fault tables and kill their actors afterwards."""
    pools: list[RayPool] = []

    def make(
        faults: dict[tuple[int, int], str] | None = None,
        start_faults: dict[int, str] | None = None,
        **options: Any,
    ) -> Bench:
        folder = tmp_path / f"pool-{len(pools)}"
        folder.mkdir()
        factory = FaultyFactory(folder, faults or {}, start_faults or {})
        quick = {"backoff_s": 0.05, "capacity_wait_s": 0.5, **options}
        pools.append(RayPool(factory, PoolOptions(**quick)))
        return Bench(pools[-1], [], folder)

    yield make
    for pool in pools:
        pool.close()


def test_replicas_share_the_units_and_survive_between_runs(bench: Callable[..., Bench]) -> None:
    """Five are asked for, and there is room for two."""
    pair = bench(replicas=5)
    pair.start_all(2)
    pair.run(12)
    pair.run(12)
    assert pair.done == sorted([*range(12)] * 2)
    assert not pair.of(ReplicaStarted)
    assert {event.replica for event in pair.of(UnitDone)} == {0, 1}
    assert {event.receipt["payload"] for event in pair.of(UnitDone)} == set(range(12))
    processes = {event.replica: event.receipt["process"] for event in pair.of(UnitDone)}
    assert all(event.receipt["process"] == processes[event.replica] for event in pair.of(UnitDone))
    assert os.getpid() not in processes.values()


def test_unit_that_kills_its_replica_runs_again_and_no_other_is_charged(bench: Callable[..., Bench]) -> None:
    single = bench({(3, 1): "die"}, replicas=1, in_flight=1)
    single.run(8)
    assert single.done == list(range(8))
    assert [(event.unit, event.attempt) for event in single.of(UnitRetried)] == [(3, 1)]
    assert {event.unit: event.attempt for event in single.of(UnitDone) if event.attempt > 1} == {3: 2}
    assert single.of(ReplicaStarted) == [ReplicaStarted(replica=0, hardware="a box")] * 2
    (lost,) = single.of(ReplicaLost)
    assert lost.replica == 0
    assert lost.error.startswith("Actor")
    assert lost.again_in_s == 0.05
    assert {event.receipt["process"] for event in single.of(UnitDone) if event.unit < 3}.isdisjoint(
        event.receipt["process"] for event in single.of(UnitDone) if event.unit >= 3
    )


def test_poison_units_fail_and_the_others_are_done(bench: Callable[..., Bench]) -> None:
    """Unit 1 always raises, and unit 5 kills its replica before the answer of the unit ahead of it may be out."""
    faults = {(1, run): "raise" for run in range(1, 10)} | {(5, run): "die at once" for run in range(1, 10)}
    pair = bench(faults, replicas=2, max_attempts=2)
    pair.run(12)
    raised, died = sorted(pair.of(UnitFailed), key=lambda event: event.unit)
    assert raised.attempts == died.attempts == 2
    assert (raised.unit, raised.error) == (1, "ValueError: unit 1 is broken")
    assert (died.unit, died.error.split(":")[0]) == (5, "ActorDiedError")
    assert pair.done == [unit for unit in range(12) if unit not in (1, 5)]
    assert max(Counter((event.unit, event.attempt) for event in pair.of(UnitStarted)).values()) == 1


def test_what_cannot_be_pickled_still_tells_its_error(bench: Callable[..., Bench]) -> None:
    single = bench({(0, 1): "raise unpicklable", (1, 1): "return unpicklable"})
    single.run(2)
    exception, receipt = single.of(UnitRetried)
    assert (exception.unit, exception.error) == (0, "UnpicklableError: no space (7)")
    assert receipt.unit == 1
    assert "annot pickle" in receipt.error
    assert single.done == [0, 1]
    assert not single.of(ReplicaLost)


def test_factory_that_raises_ends_the_run_with_its_text(bench: Callable[..., Bench]) -> None:
    broken = bench(start_faults=dict.fromkeys(range(1, 10), "raise"), max_attempts=2)
    with pytest.raises(ReplicaStartError, match=r"Replica 0 cannot start \(tried 2 times\): OSError: no weights\."):
        broken.run(2)
    assert broken.events == [
        ReplicaLost(replica=0, error="OSError: no weights", again_in_s=0.05),
        ReplicaLost(replica=0, error="OSError: no weights", again_in_s=None),
    ]
    assert (broken.folder / "starts").stat().st_size == 2


def test_factory_that_kills_its_process_ends_the_run(bench: Callable[..., Bench]) -> None:
    broken = bench(start_faults=dict.fromkeys(range(1, 10), "die"), max_restarts=1)
    with pytest.raises(ReplicaStartError, match=r"Replica 0 cannot start \(tried 2 times\): ActorDiedError"):
        broken.run(2)
    assert (broken.folder / "starts").stat().st_size == 2


def test_replica_that_cannot_come_back_leaves_the_rest_to_the_others(bench: Callable[..., Bench]) -> None:
    pair = bench({(0, 1): "die"}, start_faults=dict.fromkeys(range(3, 10), "raise"), replicas=2, max_attempts=2)
    pair.start_all(2)
    pair.run(8)
    assert pair.done == list(range(8))
    assert not pair.of(ReplicaStarted)


def test_run_ends_when_no_replica_is_left(bench: Callable[..., Bench]) -> None:
    single = bench({(2, 1): "die"}, max_restarts=0)
    with pytest.raises(
        PoolError, match=r"No replica is left: all 1 were lost, the last with Actor.*max_restarts \(0\)"
    ):
        single.run(8)
    assert single.done == [0, 1]
    single.run(8)
    assert single.done == sorted([0, 1, *range(8)])


def test_a_ray_that_stops_answering_is_one_sentence(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    single = bench()

    def silent(*args: Any, **kwargs: Any) -> Any:
        raise ray.exceptions.RaySystemError("connection to the head was lost")

    with monkeypatch.context() as patch:
        patch.setattr(ray, "wait", silent)
        with pytest.raises(
            PoolError, match=r"^the Ray cluster stopped answering: .*the head was lost.* Finished units"
        ):
            single.run(2)
    single.run(2)
    assert sorted(single.done) == [0, 1]


def test_gpu_that_the_cluster_lacks_is_an_error_with_the_numbers(bench: Callable[..., Bench]) -> None:
    with pytest.raises(PoolError) as caught:
        bench(gpus_per_replica=1).run(1)
    assert str(caught.value).startswith(
        "The cluster cannot hold the pool: a replica asks for 1 CPU and 1 GPU on one node, "
        "the cluster has 2 CPU, 0 GPU on 1 node(s), after "
    )


def test_replica_waits_for_the_place_of_another_pool(bench: Callable[..., Bench]) -> None:
    holder, waiter = bench(replicas=2), bench(replicas=1)
    holder.start_all(2)

    def give_way() -> None:
        holder.pool.close()

    waiter.run(2, stop=give_way)
    assert waiter.done == [0, 1]


def test_hung_unit_is_done_by_another_replica(bench: Callable[..., Bench]) -> None:
    pair = bench({(3, 1): "hang"}, replicas=2, in_flight=1, lease_s=4, straggler_factor=0)
    pair.run(8)
    assert pair.done == list(range(8))
    assert [(event.unit, event.attempt) for event in pair.of(UnitRetried)] == [(3, 1)]
    (lost,) = pair.of(ReplicaLost)
    assert lost.error == "the unit ran longer than its lease of 4 s; the replica counts as hung"


def test_straggler_is_copied_and_counted_once(bench: Callable[..., Bench]) -> None:
    pair = bench({(11, 1): "hang"}, replicas=2, in_flight=1, straggler_factor=3)
    pair.start_all(2)
    pair.run(12)
    assert sorted(event.unit for event in pair.of(UnitDone)) == list(range(12))
    assert [event.unit for event in pair.of(UnitStarted) if event.copy] == [11]
    assert not pair.of(UnitRetried)


def test_death_of_an_idle_replica_is_noticed(bench: Callable[..., Bench]) -> None:
    """Unit 0 runs until the loss of the other replica, which is killed after it has done unit 1, is heard of."""
    pair = bench({(0, 1): "wait"}, replicas=2, straggler_factor=0)

    def watch(event: Event) -> None:
        if isinstance(event, UnitDone) and event.unit == 1:
            os.kill(event.receipt["process"], signal.SIGKILL)
        elif isinstance(event, ReplicaLost):
            (pair.folder / "go").touch()

    pair.run(2, on_event=watch)
    assert pair.done == [0, 1]
    assert not pair.of(UnitRetried)
    assert [event.replica for event in pair.of(ReplicaLost)] == [
        event.replica for event in pair.of(UnitDone) if event.unit == 1
    ]


def test_stopped_run_finishes_what_runs_and_leaves_the_rest(bench: Callable[..., Bench]) -> None:
    single = bench({(2, 1): "wait"}, in_flight=1, drain_s=60)

    def stop() -> str | None:
        if not any(event.unit == 2 for event in single.of(UnitStarted)):
            return None
        (single.folder / "go").touch()
        return "told to"

    assert single.run(20, stop=stop) is False
    assert single.done == [0, 1, 2]
    assert [event.units for event in single.of(PoolDraining)] == [1]
    assert not single.of(UnitRetried)


def test_units_are_pulled_only_a_few_ahead(bench: Callable[..., Bench]) -> None:
    single = bench(replicas=1, in_flight=2)
    progress = Counter[str]()

    def source() -> Iterator[WorkUnit]:
        for index in range(60):
            progress["pulled"] += 1
            yield WorkUnit(index, 0, index)

    def watch(event: Event) -> None:
        progress["done"] += isinstance(event, UnitDone)
        assert progress["pulled"] - progress["done"] <= 2 + max(4 * 2, 5 + 1)

    single.pool.run(source(), watch)
    assert progress == {"pulled": 60, "done": 60}


def test_interrupt_kills_the_actors_and_the_pool_runs_again(bench: Callable[..., Bench]) -> None:
    single = bench()

    def interrupt(event: Event) -> None:
        if isinstance(event, UnitDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        single.pool.run((WorkUnit(index, 0, index) for index in range(50)), interrupt)
    assert len(list(single.folder.glob("unit-*"))) < 50
    single.run(3)
    assert single.done == [0, 1, 2]
    assert single.of(ReplicaStarted) == [ReplicaStarted(replica=0, hardware="a box")]


def test_pool_satisfies_the_executor_protocol_and_closes_twice(bench: Callable[..., Bench]) -> None:
    executor: Executor = bench().pool
    executor.run([], lambda event: pytest.fail("no unit, no event"))
    executor.close()
    executor.close()


class TestBackend:
    """What a backend promises, asked of Ray."""

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Iterator[Callable[..., RayBackend]]:
        made: list[RayBackend] = []

        def make(faults: dict[tuple[int, int], str] | None = None, notices: Sequence[str] = ()) -> RayBackend:
            made.append(RayBackend(FaultyFactory(tmp_path, faults or {}, {}), PoolOptions(), notices))
            made[-1].open()
            return made[-1]

        yield make
        for each in made:
            each.close()

    def test_replica_is_placed_then_built_then_answers_in_the_order_sent(
        self, backend: Callable[..., RayBackend]
    ) -> None:
        ray_backend = backend()
        ray_backend.spawn(0)
        assert listen(ray_backend, 2) == [Placed(replica=0), Built(replica=0, hardware="a box")]
        for ticket in range(20):
            ray_backend.send(0, ticket, ticket)
        receipts = [answer.outcome.receipt for answer in listen(ray_backend, 20)]
        assert [receipt["payload"] for receipt in sorted(receipts, key=itemgetter("turn"))] == list(range(20))

    def test_no_answer_follows_a_kill(self, backend: Callable[..., RayBackend], tmp_path: Path) -> None:
        ray_backend = backend({(0, 1): "wait"})
        ray_backend.spawn(0)
        listen(ray_backend, 2)
        ray_backend.send(0, 1, 0)
        assert ray_backend.wait(0.1) == []
        ray_backend.kill(0)
        ray_backend.spawn(0)
        assert [type(answer) for answer in listen(ray_backend, 2)] == [Placed, Built]
        assert ray_backend.wait(0.1) == []

    def test_death_takes_all_calls_along_and_is_told_once(self, backend: Callable[..., RayBackend]) -> None:
        ray_backend = backend({(1, 1): "die at once"})
        ray_backend.spawn(0)
        listen(ray_backend, 2)
        for ticket in range(4):
            ray_backend.send(0, ticket, ticket)
            # On their own, as the receipt of a unit is lost when one of the same call kills.
            ray_backend._paces.clear()
            ray_backend._send_off()
        *before, died = listen(ray_backend, 1, until=Died)
        assert died.error.startswith("ActorDiedError")
        # The receipt of the unit before may be lost with the process.
        assert {(type(answer), answer.ticket) for answer in before} <= {(Finished, 0)}
        ray_backend.kill(0)
        assert ray_backend.wait(0.1) == []

    def test_notice_refuses_what_has_not_begun(self, backend: Callable[..., RayBackend], tmp_path: Path) -> None:
        ray_backend = backend({(0, 1): "wait"}, notices=[f"file:{tmp_path / 'leave'}"])
        ray_backend.spawn(0)
        listen(ray_backend, 2)
        for ticket in range(2):
            ray_backend.send(0, ticket, ticket)
            ray_backend._send_off()
        wait_for(tmp_path / "unit-0")
        (tmp_path / "leave").touch()
        assert listen(ray_backend, 1) == [Leaving(replica=0, reason=f"{tmp_path / 'leave'} is there")]
        (tmp_path / "go").touch()
        finished, refused, *again = listen(ray_backend, 2)
        assert (finished.ticket, finished.outcome.refused) == (0, False)
        assert (refused.ticket, refused.outcome.refused) == (1, True)
        assert all(isinstance(answer, Leaving) for answer in again)
        assert not (tmp_path / "unit-1").exists()

    def test_shunned_node_holds_nothing_more(self, backend: Callable[..., RayBackend]) -> None:
        ray_backend = backend()
        assert ray_backend.capacity()[0] == 1
        ray_backend.spawn(0)
        listen(ray_backend, 2)
        ray_backend.kill(0, shun_node=True)
        assert ray_backend.capacity()[0] == 0
        ray_backend.spawn(0)
        assert ray_backend.wait(1.0) == []

    def test_waiting_for_nothing_takes_its_time(self, backend: Callable[..., RayBackend]) -> None:
        began = time.monotonic()
        assert backend().wait(0.05) == []
        assert time.monotonic() - began >= 0.05


def listen(backend: RayBackend, answers: int, until: type = object) -> list[Any]:
    """Return at least so many answers of a kind, and all others that came with them or before."""
    deadline, heard = time.monotonic() + 60, []
    while sum(isinstance(answer, until) for answer in heard) < answers:
        assert time.monotonic() < deadline, heard
        heard += backend.wait(1.0)
    return heard


@pytest.mark.parametrize(
    ("asked", "nodes", "places"),
    [
        pytest.param({"replicas": 4}, [{"CPU": 2.0}, {"CPU": 2.0}], 4, id="spread over nodes"),
        pytest.param({"replicas": 2, "cpus_per_replica": 3}, [{"CPU": 4.0}, {"CPU": 2.0}], 1, id="split over nodes"),
        pytest.param({"replicas": 10, "cpus_per_replica": 0.1}, [{"CPU": 1.0}], 10, id="tenths of a CPU"),
        pytest.param({"replicas": 5, "gpus_per_replica": 0.2}, [{"CPU": 8.0, "GPU": 1.0}], 5, id="fifths of a GPU"),
        pytest.param({"replicas": 3, "gpus_per_replica": 0.6}, [{"CPU": 8.0, "GPU": 2.0}], 2, id="share of two GPUs"),
        pytest.param({"replicas": 3, "gpus_per_replica": 2}, [{"CPU": 8.0, "GPU": 5.0}], 2, id="several GPUs"),
        pytest.param({"replicas": 9, "cpus_per_replica": 0}, [{}], 9, id="nothing asked"),
        pytest.param({"replicas": 1}, [], 0, id="no node"),
    ],
)
def test_places_are_whole_replicas_on_each_node(
    asked: dict[str, Any], nodes: list[dict[str, float]], places: int
) -> None:
    options = PoolOptions(**asked)
    assert min(sum(places_on(node, options) for node in nodes), options.replicas) == places
