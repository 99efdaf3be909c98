"""A Ray cluster of several nodes on this machine, in a process of its own, whose nodes die and come on command.

Ray's processes must not be started by the process that forks drivers: that one has no threads and opens no connection.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NODES = 2
CPUS = 2
_PATIENCE_S = 120
_STORE_BYTES = 80_000_000
_HEALTH = {"health_check_initial_delay_ms": 2000, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
"""A killed node is noticed by its broken connections at once; these find out about one that only hangs."""


class Nodes:
    """The cluster as the driver of the trials sees it; use as a context manager.

    Attributes
    ----------
    address : of the cluster, for ``RAY_ADDRESS``.
    """

    def __init__(self, log: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        # Many processes start on few cores: slowly rather than not at all.
        environment.setdefault("RAY_raylet_start_wait_time_s", "300")
        environment.pop("RAY_ADDRESS", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.nodes"],
            cwd=ROOT,
            env={**environment, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            text=True,
        )
        self._unanswered = 0
        self.address = self._answer()

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=120)

    def replace(self, index: int) -> None:
        """Kill a node with everything on it, and add another one; returns at once, see ``settle``."""
        self._say(f"replace {index}")

    def settle(self) -> None:
        """Wait until all nodes are there; one that Ray gave up on is replaced as well."""
        while self._unanswered:
            self._answer()
            self._unanswered -= 1
        self._say("complete")
        self._answer()
        self._unanswered -= 1

    def _say(self, command: str) -> None:
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        self._unanswered += 1

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"the process of the cluster has ended with code {self._process.wait(timeout=60)}.")
        return answer


def _serve() -> None:
    """Run the cluster until the standard input ends."""
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(1), "w")
    # Ray prints to the standard output too, which is for answers alone.
    os.dup2(2, 1)
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": _STORE_BYTES, "_system_config": _HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [_add(cluster) for _ in range(NODES)]
    cluster.wait_for_nodes(timeout=_PATIENCE_S)
    print(cluster.address, file=answers, flush=True)
    for line in sys.stdin:
        match line.split():
            case ["replace", index]:
                node = nodes.pop(int(index) % len(nodes))
                cluster.remove_node(node, allow_graceful=False)
                nodes.append(_add(cluster))
            case ["complete"]:
                for node in [node for node in nodes if not node.remaining_processes_alive()]:
                    nodes.remove(node)
                    cluster.remove_node(node, allow_graceful=False)
                    nodes.append(_add(cluster))
                cluster.wait_for_nodes(timeout=_PATIENCE_S)
        print("ok", file=answers, flush=True)
    cluster.shutdown()


def _add(cluster: Any) -> Any:
    return cluster.add_node(wait=False, num_cpus=CPUS, object_store_memory=_STORE_BYTES)


if __name__ == "__main__":
    _serve()
