"""Plays cases on a cluster of several local Ray nodes with GPUs that are not there, and prints what happened as JSON.

A script, run by ``test_pool_cluster.py``: a process has one connection to Ray, and that of the tests is taken.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from cluster import Event, PoolError, PoolOptions, ReplicaLost, ReplicaReleased, ReplicaStarted, UnitDone, WorkUnit
from cluster.ray_pool import RayPool
from tests.faulty_worker import FaultyWorker, where

# A lost node is noticed after about 22 seconds by default.
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
MEMORY = 80 * 2**20
PATIENCE_S = 60.0


@dataclass
class NodeFactory:
    """Builds a worker whose working directory is that of its node, so that nodes see different files."""

    folder: Path
    faults: dict[tuple[int, int], str] = field(default_factory=dict)

    def __call__(self) -> FaultyWorker:
        home = self.folder / where()["node"]
        home.mkdir(exist_ok=True)
        os.chdir(home)
        return FaultyWorker(self.folder, self.faults)


@dataclass
class Stage:
    """The cluster, a folder for one case, and the events of its pool."""

    cluster: Cluster
    folder: Path
    events: list[Event] = field(default_factory=list)

    def run(
        self,
        units: Iterator[WorkUnit] | range,
        *,
        faults: dict[tuple[int, int], str] | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
        notices: tuple[str, ...] = (),
        **options: Any,
    ) -> dict[str, Any]:
        """Run units and return the outcome as plain data."""

        def observe(event: Event) -> None:
            self.events.append(event)
            on_event(event)

        chosen = PoolOptions(**{"cpus_per_replica": 0.5, "backoff_s": 0.05, "capacity_wait_s": 10, **options})
        pool = RayPool(NodeFactory(self.folder, faults or {}), chosen, notices)
        began, error, finished = time.monotonic(), None, None
        try:
            source = (WorkUnit(unit, 0, unit) for unit in units) if isinstance(units, range) else units
            finished = pool.run(source, observe)
        except PoolError as problem:
            error = str(problem)
        finally:
            pool.close()
        seconds = time.monotonic() - began
        # The next case counts on all resources, which come back a little after the replicas have gone.
        wait_until(lambda: ray.available_resources().get("GPU", 0) == ray.cluster_resources().get("GPU", 0))
        return {
            "finished": finished,
            "error": error,
            "seconds": seconds,
            "events": [{"kind": type(event).__name__, **asdict(event)} for event in self.events],
        }

    def until(self, reached: Callable[[], bool]) -> Iterator[WorkUnit]:
        """Give units until something has happened."""
        deadline = time.monotonic() + PATIENCE_S
        for unit in itertools.count():
            if reached():
                return
            if time.monotonic() > deadline:
                raise TimeoutError("what the case waits for did not happen")
            yield WorkUnit(unit, 0, unit)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def working(self) -> set[int]:
        """Return the replicas that have done something."""
        return {event.replica for event in self.of(UnitDone)}


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError("the cluster did not settle")
        time.sleep(0.05)


def whole_gpus(stage: Stage) -> dict[str, Any]:
    return stage.run(stage.until(lambda: len(stage.working()) == 4), replicas=4, gpus_per_replica=1)


def shared_gpus(stage: Stage) -> dict[str, Any]:
    return stage.run(stage.until(lambda: len(stage.working()) == 8), replicas=8, gpus_per_replica=0.5)


def several_gpus(stage: Stage) -> dict[str, Any]:
    return stage.run(stage.until(lambda: len(stage.working()) == 2), replicas=2, gpus_per_replica=2)


def too_many_gpus(stage: Stage) -> dict[str, Any]:
    return stage.run(range(5), replicas=1, gpus_per_replica=3, capacity_wait_s=2)


def idle_release(stage: Stage) -> dict[str, Any]:
    """Unit 0 goes on until the GPUs of the other replica, which is idle, are free."""
    free: list[float] = []

    def watch(event: Event) -> None:
        if isinstance(event, ReplicaReleased):
            wait_until(lambda: ray.available_resources().get("GPU", 0) >= 2)
            free.append(ray.available_resources()["GPU"])
            (stage.folder / "go").touch()

    outcome = stage.run(
        range(2),
        faults={(0, 1): "wait"},
        on_event=watch,
        replicas=2,
        gpus_per_replica=2,
        idle_release_s=0.5,
        straggler_factor=0,
    )
    return {**outcome, "free": free}


def node_that_comes_and_is_killed(stage: Stage) -> dict[str, Any]:
    """The third replica finds its place only on a node that joins while units run; then that node is lost."""
    nodes: list[Any] = []

    def watch(event: Event) -> None:
        if isinstance(event, UnitDone) and not nodes:
            nodes.append(stage.cluster.add_node(num_cpus=2, num_gpus=2, object_store_memory=MEMORY))
        if isinstance(event, UnitDone) and len(nodes) == 1 and len(stage.working()) == 3:
            nodes.append("removed")
            stage.cluster.remove_node(nodes[0], allow_graceful=False)

    def over() -> bool:
        return bool(stage.of(ReplicaLost))

    outcome = stage.run(stage.until(over), on_event=watch, replicas=3, gpus_per_replica=2)
    wait_until(lambda: ray.cluster_resources().get("GPU", 0) == 4)
    return outcome


def leaving_notice(stage: Stage) -> dict[str, Any]:
    """The node of the first unit is told that it will go once both replicas work."""
    told: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, UnitDone) and not told and len(stage.working()) == 2:
            told.append(event.receipt["node"])
            (stage.folder / told[0] / "leave").touch()

    def over() -> bool:
        released = {event.replica for event in stage.of(ReplicaReleased)}
        again = {event.replica for event in stage.of(ReplicaStarted)[2:]}
        return bool(released) and released <= again

    outcome = stage.run(
        stage.until(over), on_event=watch, notices=("file:leave",), replicas=2, gpus_per_replica=1, in_flight=2
    )
    return {**outcome, "told": told}


CASES = (
    whole_gpus,
    shared_gpus,
    several_gpus,
    too_many_gpus,
    idle_release,
    node_that_comes_and_is_killed,
    leaving_notice,
)


def main(folder: Path) -> None:
    """Play every case on a head without resources and two nodes of two GPUs."""
    head = {
        "num_cpus": 0,
        "object_store_memory": MEMORY,
        "include_dashboard": False,
        "_system_config": HEALTH,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=4, num_gpus=2, object_store_memory=MEMORY)
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        cluster.wait_for_nodes()
        for case in CASES:
            place = folder / case.__name__
            place.mkdir()
            try:
                outcome = case(Stage(cluster, place))
            except Exception:
                outcome = {"crash": traceback.format_exc()}
            (folder / f"{case.__name__}.json").write_text(json.dumps(outcome, default=str), encoding="utf-8")
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
