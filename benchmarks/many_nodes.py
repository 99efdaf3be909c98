"""Many nodes under one pool: ``python -m benchmarks.many_nodes``.

A real Ray cluster of simulated nodes, each a raylet of its own with one fake GPU, all on this machine. One replica a
node is scheduled; in the middle of what all of them do together, two nodes are killed; every unit must end
as done, and idle replicas must be released until all GPUs but the standby's are free again. Printed as JSON, with the
seconds of each part, what the processes take, and how busy the cluster's head is with a quarter of the nodes, with all
of them, and while units run.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.figures import Bench, Target
from cluster import Event, PoolOptions, UnitDone, WorkUnit

NODES = 64
TARGETS = (
    Target(what="simulated nodes that got a replica", figure="nodes_used", bound="at least", limit=NODES),
    Target(what="units lost", figure="units_lost", bound="at most", limit=0),
    Target(what="GPUs still taken once all but one unit are done", figure="gpus_taken", bound="at most", limit=2),
    Target(what="processes left over", figure="processes_left", bound="at most", limit=0),
)
HEALTH = {
    "health_check_initial_delay_ms": 30_000,
    "health_check_period_ms": 10_000,
    "health_check_timeout_ms": 60_000,
    "health_check_failure_threshold": 5,
    # Were this process killed, the kernel would take the head along, and the nodes would miss it after so long.
    "gcs_rpc_server_reconnect_timeout_s": 30,
}
"""Patient, as so many processes share few cores; nodes that are killed are noticed by their broken connections."""
ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "60",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
    # Ray gives its workers way to everything else, and on a busy machine they would hardly ever start.
    "RAY_worker_niceness": "0",
}
STORE_BYTES = 80 * 10**6
STARTED_TOGETHER = 3
START_ATTEMPTS = 4
PATIENCE_S = 600.0
WATCHED_S = 10.0


class Nap:
    """A worker that sleeps as long as it is told, as a denoiser on a GPU leaves the processor alone."""

    def __init__(self) -> None:
        import ray

        self._node = str(ray.get_runtime_context().get_node_id())

    def run(self, payload: float) -> str:
        """Sleep and return the node."""
        time.sleep(payload)
        return self._node


class Nodes:
    """A head without resources and nodes of one fake GPU, on this machine."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self._folder = folder
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        self.cluster = Cluster(
            initialize_head=True, head_node_args={**head, "temp_dir": str(folder), "_system_config": HEALTH}
        )
        # The nodes are ended by ``close``: Ray's own hooks for that can be set by the main thread only.
        self.cluster._shutdown_at_exit = False
        self.nodes: list[Any] = []

    def grow(self, to: int) -> None:
        """Start nodes, a few at a time, and wait until all of them have registered.

        Raises
        ------
        TimeoutError : some do not.
        """
        starters = ThreadPoolExecutor(STARTED_TOGETHER)
        try:
            for node in starters.map(self._start, range(len(self.nodes), to)):
                self.nodes.append(node)
        finally:
            starters.shutdown(cancel_futures=True)
        self.cluster.wait_for_nodes(timeout=PATIENCE_S)

    def _start(self, number: int) -> Any:
        for attempt in range(START_ATTEMPTS - 1):
            try:
                return self._started(f"{number}.{attempt}")
            except Exception as error:
                # A raylet gives up when its agents, two more processes, are not up within half a minute.
                print(f"node {number} did not start and is tried again: {error}", file=sys.stderr, flush=True)
        return self._started(f"{number}.last")

    def _started(self, name: str) -> Any:
        # Named here, as nodes that start together would choose the same names.
        sockets = {kind: str(self._folder / f"{kind}{name}") for kind in ("raylet", "plasma")}
        return self.cluster.add_node(
            wait=False,
            num_cpus=1,
            num_gpus=1,
            object_store_memory=STORE_BYTES,
            raylet_socket_name=sockets["raylet"],
            plasma_store_socket_name=sockets["plasma"],
        )

    def kill(self, count: int) -> None:
        """Kill the first nodes with everything on them."""
        for node in self.nodes[:count]:
            self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        """Kill every node, the head last."""
        self.cluster.shutdown()


@contextmanager
def cluster_here() -> Iterator[Nodes]:
    """Give a cluster that is gone afterwards, whatever happens; SIGTERM ends it in good order as well."""
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    # Short, as the names of sockets are limited to about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="nodes", ignore_cleanup_errors=True) as folder:
        nodes = Nodes(Path(folder))
        # After Ray has set its own, which would end the head alone.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        try:
            yield nodes
        finally:
            with suppress(ImportError):
                import ray

                ray.shutdown()
            nodes.close()


@dataclass
class Story:
    """A run of the pool: units until every node has done one, and then so many more, in the middle of which it happens.

    Attributes
    ----------
    nodes, units : how many nodes there are, and how many units are given out once all of them work.
    unit_s : length of a unit.
    half : called once half of those are done. patience_s : how long the first units are given out at most.
    given, done, used : numbers of units given out and done; how many units each node did.
    seconds_to_start : until every node had done a unit; 0 if not all of them did.
    busy, memory : what the processes took from then until ``half``, and at its beginning.
    """

    nodes: int
    units: int
    unit_s: float
    half: Callable[[], None]
    patience_s: float = PATIENCE_S
    given: int = 0
    done: set[int] = field(default_factory=set)
    used: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    seconds_to_start: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    memory: dict[str, dict[str, Any]] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)
    _watch: Any = None
    _from: tuple[float, int] = (0.0, 0)

    def supply(self) -> Iterator[WorkUnit]:
        """Yield the units, as the pool pulls them."""
        while self._watch is None and _now() - self._began < self.patience_s:
            yield self._next()
        for _ in range(self.units if self._watch is not None else 0):
            yield self._next()

    def hear(self, event: Event) -> None:
        """Take note of an event."""
        self.counts[type(event).__name__] += 1
        if not isinstance(event, UnitDone):
            return
        self.done.add(event.unit)
        self.used[event.receipt] += 1
        if self._watch is None and len(self.used) == self.nodes:
            self._all_work()
        elif self._watch is not None and len(self.done) == self._from[1] + self.units // 2:
            units_a_second = (len(self.done) - self._from[1]) / (_now() - self._from[0])
            self.busy = {**self._watch.cores(), "units_a_second": round(units_a_second, 1)}
            self.half()

    def require_all_nodes(self) -> None:
        """Make sure that every node worked.

        Raises
        ------
        RuntimeError : some did not; nothing was measured then.
        """
        if not self.busy:
            raise RuntimeError(
                f"only {len(self.used)} of {self.nodes} nodes did a unit within {self.patience_s:g} s. "
                "Try again when the machine is less busy, or with fewer --nodes."
            )

    def _next(self) -> WorkUnit:
        self.given += 1
        return WorkUnit(self.given - 1, (self.given - 1) % self.nodes, self.unit_s)

    def _all_work(self) -> None:
        self.seconds_to_start = _now() - self._began
        running = [*processes.started(), processes.this()]
        self.memory = processes.memory(processes.started())
        self._watch, self._from = processes.Stopwatch(running), (_now(), len(self.done))


def main() -> int:
    """Build the cluster, run, and print what happened."""
    bench = Bench(__doc__)
    bench.parser.add_argument("--nodes", type=int, default=NODES)
    bench.parser.add_argument("--units-a-node", type=int, default=8, help="once all nodes work")
    bench.parser.add_argument("--seconds", type=float, default=2.0, help="length of a unit")
    bench.parser.add_argument("--lost", type=int, default=2, help="nodes killed in the middle")
    args = bench.parser.parse_args()
    seen = []
    with cluster_here() as nodes:
        figures = measure(nodes, args.nodes, args.nodes * args.units_a_node, args.seconds, args.lost)
        seen = processes.started()
    figures["processes_left"] = len(processes.take_away(seen))
    return bench.conclude(args, figures, TARGETS)


def measure(nodes: Nodes, count: int, units: int, unit_s: float, lost: int) -> dict[str, Any]:
    """Grow a cluster in two steps, run units on it, and return what happened."""
    import ray

    from cluster.ray_pool import RayPool

    began, stages = _now(), []
    for size in (count // 4, count):
        nodes.grow(size)
        stages.append({"nodes": size, "seconds_to_start": round(_now() - began, 1), **_idle_head()})
        print(f"{size} nodes are up after {_now() - began:.0f} s", file=sys.stderr, flush=True)
    ray.init(address=nodes.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    options = PoolOptions(
        replicas=count, gpus_per_replica=1, start_timeout_s=PATIENCE_S, capacity_wait_s=60, idle_release_s=1
    )
    pool = RayPool(Nap, options)
    story = Story(count, units, unit_s, lambda: nodes.kill(lost))
    began = _now()
    finished = pool.run(story.supply(), story.hear)
    seconds = _now() - began
    assert finished, "the run was not stopped by anybody"
    story.require_all_nodes()
    given, done = story.given, len(story.done)
    # One last long unit: everybody else is idle meanwhile and must go.
    pool.run([WorkUnit(given, 0, 20.0)], story.hear)
    free = ray.available_resources().get("GPU", 0)
    pool.close()
    return {
        "nodes": count,
        "nodes_killed": lost,
        "nodes_used": len(story.used),
        "units": given,
        "units_done": done,
        "units_failed": story.counts["UnitFailed"],
        "units_lost": given - done,
        "units_retried": story.counts["UnitRetried"],
        "gpus_taken": count - lost - round(free),
        "seconds_to_start_the_replicas": round(story.seconds_to_start, 1),
        "seconds_to_run": round(seconds, 1),
        "stages": stages,
        "cores_while_running": story.busy,
        "memory": story.memory,
    }


def _idle_head() -> dict[str, float]:
    """Return cores and memory of the process that knows the whole cluster, while nothing is asked of it."""
    head = [p for p in processes.started() if processes.kind_of(" ".join(p.cmdline())) == "gcs"]
    watch = processes.Stopwatch(head)
    time.sleep(WATCHED_S)
    return {"gcs_cores": watch.cores()["gcs"], "gcs_mib": processes.memory(head)["gcs"]["mib_each"]}


_now = time.perf_counter


if __name__ == "__main__":
    sys.exit(main())
