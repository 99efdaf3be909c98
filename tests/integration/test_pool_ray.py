"""The Ray pool: real processes that die at the attempts that a table names."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster import (
    Event,
    Executor,
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

from cluster.pool import RayPool, require_capacity  # noqa: E402

pytestmark = pytest.mark.usefixtures("ray_session")

# Replicas cannot import this module by the name that pytest gives it.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class UnpicklableError(Exception):
    """Cannot be rebuilt from its arguments, as many library exceptions cannot."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")


@dataclass
class FaultyWorker:
    """Fails in the attempts that a table names by unit and attempt; attempts are counted in files, across processes."""

    folder: Path
    faults: dict[tuple[int, int], str]

    def run(self, payload: int) -> dict[str, int]:
        match self.faults.get((payload, count(self.folder / f"unit-{payload}"))):
            case "raise":
                raise ValueError(f"unit {payload} is broken")
            case "raise unpicklable":
                raise UnpicklableError(7, "no space")
            case "return unpicklable":
                return {"lock": sys.stdout}  # type: ignore[dict-item]
            case "die":
                # Dies as the known runner, not while the driver still waits for the unit before.
                wait_for(self.folder / f"started-{payload}")
                os._exit(1)
            case "die at once":
                os._exit(1)
        return {"payload": payload, "process": os.getpid()}


@dataclass
class FaultyFactory:
    """Builds the worker, or fails in the starts that a table names."""

    folder: Path
    faults: dict[tuple[int, int], str]
    start_faults: dict[int, str]

    def __call__(self) -> FaultyWorker:
        match self.start_faults.get(count(self.folder / "starts")):
            case "raise":
                raise OSError("no weights")
            case "die":
                os._exit(1)
        return FaultyWorker(self.folder, self.faults)


def count(path: Path) -> int:
    """Add one to the number that a file keeps as its length, and return it."""
    with path.open("ab") as file:
        file.write(b".")
        return file.tell()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


@dataclass
class Bench:
    """A pool under test with the events of its runs."""

    pool: RayPool
    events: list[Event]
    folder: Path

    def run(self, units: int) -> None:
        self.pool.run((WorkUnit(index, index // 4, index) for index in range(units)), self.observe)

    def observe(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, UnitStarted):
            (self.folder / f"started-{event.unit}").touch()

    def start_all(self, replicas: int) -> None:
        """Run throw-away units until every replica is up, as a run of short units may end before the last one is."""
        deadline = time.monotonic() + 60
        started: list[Event] = []
        while len({event for event in started if isinstance(event, ReplicaStarted)}) < replicas:
            assert time.monotonic() < deadline
            self.pool.run([WorkUnit(1000, 0, 1000)], started.append)

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
        pools.append(RayPool(factory, PoolOptions(**options)))
        return Bench(pools[-1], [], folder)

    yield make
    for pool in pools:
        pool.close()


def test_two_replicas_share_the_units_and_survive_between_runs(bench: Callable[..., Bench]) -> None:
    pair = bench(replicas=2)
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
    single = bench({(3, 1): "die"}, replicas=1)
    single.run(8)
    assert single.done == list(range(8))
    assert [(event.unit, event.attempt) for event in single.of(UnitRetried)] == [(3, 1)]
    assert {event.unit: event.attempt for event in single.of(UnitDone) if event.attempt > 1} == {3: 2}
    assert single.of(ReplicaStarted) == [ReplicaStarted(replica=0)] * 2
    (lost,) = single.of(ReplicaLost)
    assert lost.replica == 0
    assert lost.error.startswith("Actor")
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
    assert (died.unit, died.error.split(":")[0]) == (5, "ActorUnavailableError")
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
    assert broken.events == [ReplicaLost(replica=0, error="OSError: no weights")] * 2
    assert (broken.folder / "starts").stat().st_size == 2


def test_factory_that_kills_its_process_ends_the_run(bench: Callable[..., Bench]) -> None:
    broken = bench(start_faults=dict.fromkeys(range(1, 10), "die"), max_restarts=1)
    with pytest.raises(ReplicaStartError, match="Replica 0 cannot start: ActorDiedError"):
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
    with pytest.raises(PoolError, match=r"No replica is left: all 1 died, the last with Actor.*max_restarts \(0\)"):
        single.run(8)
    assert single.done == [0, 1]
    single.run(8)
    assert single.done == sorted([0, 1, *range(8)])


def test_replica_that_finds_no_room_in_time_is_an_error(bench: Callable[..., Bench]) -> None:
    holder, waiter = bench(replicas=2), bench(start_timeout_s=0.5)
    holder.start_all(2)
    with pytest.raises(ReplicaStartError, match=r"no answer within start_timeout_s \(0\.5 s\), asked for 1 replica"):
        waiter.run(1)


def test_gpu_that_the_cluster_lacks_is_an_error_at_once(bench: Callable[..., Bench]) -> None:
    with pytest.raises(PoolError, match=r"asked for 1 replica\(s\) of 1 CPU and 1 GPU, the cluster has 2 CPU, 0 GPU"):
        bench(gpus_per_replica=1).run(1)


def test_units_are_pulled_only_a_few_ahead(bench: Callable[..., Bench]) -> None:
    single = bench(replicas=1, in_flight=2)
    progress = Counter[str]()

    def source() -> Iterator[WorkUnit]:
        for index in range(60):
            progress["pulled"] += 1
            yield WorkUnit(index, 0, index)

    def watch(event: Event) -> None:
        progress["done"] += isinstance(event, UnitDone)
        assert progress["pulled"] - progress["done"] <= (4 + 1) * 2

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
    assert single.of(ReplicaStarted) == [ReplicaStarted(replica=0)]


def test_pool_satisfies_the_executor_protocol_and_closes_twice(bench: Callable[..., Bench]) -> None:
    executor: Executor = bench().pool
    executor.run([], lambda event: pytest.fail("no unit, no event"))
    executor.close()
    executor.close()


def test_pool_without_replicas_is_refused() -> None:
    with pytest.raises(ValueError, match="A Ray pool needs replicas: 0 were asked for"):
        RayPool(lambda: None, PoolOptions(replicas=0))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("asked", "nodes", "fits"),
    [
        pytest.param({"replicas": 4}, [{"CPU": 2.0}, {"CPU": 2.0}], True, id="spread over nodes"),
        pytest.param(
            {"replicas": 2, "cpus_per_replica": 3}, [{"CPU": 4.0}, {"CPU": 2.0}], False, id="split over nodes"
        ),
        pytest.param({"replicas": 10, "cpus_per_replica": 0.1}, [{"CPU": 1.0}], True, id="tenths of a CPU"),
        pytest.param({"replicas": 5, "gpus_per_replica": 0.2}, [{"CPU": 8.0, "GPU": 1.0}], True, id="fifths of a GPU"),
        pytest.param(
            {"replicas": 3, "gpus_per_replica": 0.6}, [{"CPU": 8.0, "GPU": 2.0}], False, id="share of two GPUs"
        ),
        pytest.param({"replicas": 9, "cpus_per_replica": 0}, [{}], True, id="nothing asked"),
        pytest.param({"replicas": 1}, [], False, id="no node"),
    ],
)
def test_capacity_counts_whole_replicas_on_each_node(
    asked: dict[str, Any], nodes: list[dict[str, float]], fits: bool
) -> None:
    options = PoolOptions(**asked)
    if fits:
        require_capacity(options, nodes)
    else:
        with pytest.raises(PoolError, match="The cluster cannot hold the pool"):
            require_capacity(options, nodes)
