"""Many nodes under one pool: ``python -m benchmarks.many_nodes``.

A real Ray cluster of simulated nodes, each a raylet of its own with one fake GPU, all on this machine. One replica a
node
is scheduled; in the middle two nodes are killed; every unit must end as done, and idle replicas must be released until
all GPUs but the standby's are free again. Printed as JSON, with the seconds of each part.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections import Counter
from typing import Any

from cluster import Event, PoolOptions, ReplicaLost, ReplicaReleased, ReplicaStarted, UnitDone, WorkUnit

HEALTH = {
    "health_check_initial_delay_ms": 5000,
    "health_check_period_ms": 3000,
    "health_check_failure_threshold": 5,
}
STORE_BYTES = 80 * 10**6


class Nap:
    """A worker that sleeps as long as it is told, as a denoiser on a GPU leaves the processor alone."""

    def run(self, payload: float) -> str:
        """Sleep and return the node."""
        import ray

        time.sleep(payload)
        return str(ray.get_runtime_context().get_node_id())


def main() -> None:
    """Build the cluster, run, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--units-a-node", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a unit")
    parser.add_argument("--lost", type=int, default=2, help="nodes killed in the middle")
    args = parser.parse_args()
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    # So many raylets share few cores: start slowly rather than not at all.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
    import ray
    from ray.cluster_utils import Cluster

    from cluster.ray_pool import RayPool

    began = time.perf_counter()
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES, "_system_config": HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [
        cluster.add_node(wait=False, num_cpus=1, num_gpus=1, object_store_memory=STORE_BYTES) for _ in range(args.nodes)
    ]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    deadline = time.monotonic() + 300
    while sum(node["Alive"] for node in ray.nodes()) <= args.nodes:
        assert time.monotonic() < deadline, "the nodes did not come up"
        time.sleep(0.5)
    built = time.perf_counter()

    units, counts, used = args.nodes * args.units_a_node, Counter[str](), Counter[str]()
    times: dict[str, float] = {}

    def on_event(event: Event) -> None:
        counts[type(event).__name__] += 1
        if isinstance(event, ReplicaStarted) and counts["ReplicaStarted"] == args.nodes:
            times["all_up"] = time.perf_counter() - built
        if isinstance(event, UnitDone):
            used[event.receipt] += 1
            if counts["UnitDone"] == units // 2:
                for node in nodes[: args.lost]:
                    cluster.remove_node(node, allow_graceful=False)
        if isinstance(event, ReplicaLost | ReplicaReleased):
            times["last_change"] = time.perf_counter() - built

    options = PoolOptions(
        replicas=args.nodes, gpus_per_replica=1, start_timeout_s=300, capacity_wait_s=60, idle_release_s=1
    )
    pool = RayPool(Nap, options)
    finished = pool.run((WorkUnit(i, i % args.nodes, args.seconds) for i in range(units)), on_event)
    seconds = time.perf_counter() - built
    # One last long unit: everybody else is idle meanwhile and must go.
    pool.run([WorkUnit(units, 0, 20.0)], on_event)
    free = ray.available_resources().get("GPU", 0)
    pool.close()
    result: dict[str, Any] = {
        "nodes": args.nodes,
        "nodes_lost": args.lost,
        "units": units,
        "units_done": counts["UnitDone"] - 1,
        "units_failed": counts["UnitFailed"],
        "units_retried": counts["UnitRetried"],
        "nodes_used": len(used),
        "seconds_to_start_the_nodes": round(built - began, 1),
        "seconds_to_start_the_replicas": round(times.get("all_up", 0.0), 1),
        "seconds_to_run": round(seconds, 1),
        "gpus_free_while_one_unit_runs": free,
    }
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(result, indent=2))
    assert finished, "the run was not stopped by anybody"
    assert (result["units_done"], result["units_failed"]) == (units, 0), result


if __name__ == "__main__":
    main()
