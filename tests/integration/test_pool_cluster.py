"""The Ray pool on a cluster of several nodes: GPUs, nodes that come, go, die, and are told to go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)


class Outcome:
    """What the script has written about one case."""

    def __init__(self, data: dict[str, Any]) -> None:
        assert "crash" not in data, data["crash"]
        self.data = data

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.data["events"] if event["kind"] == kind]

    @property
    def places(self) -> dict[int, tuple[str, str]]:
        """Node and GPUs of each replica, as its last receipt told."""
        return {event["replica"]: (event["receipt"]["node"], event["receipt"]["gpus"]) for event in self.of("UnitDone")}

    def require_whole(self) -> None:
        """Assert that every unit was done, once."""
        assert self.data["error"] is None
        assert self.data["finished"] is True
        done = Counter(event["unit"] for event in self.of("UnitDone"))
        assert sorted(done) == list(range(len(done)))
        assert set(done.values()) == {1}
        assert not self.of("UnitFailed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Play all cases once."""
    folder = tmp_path_factory.mktemp("cluster")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, "-m", "tests.integration.pool_on_cluster", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def outcome(folder: Path, request: pytest.FixtureRequest) -> Outcome:
    """Return the outcome of the case that the test is named after."""
    name = request.node.name.removeprefix("test_")
    return Outcome(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def test_whole_gpus(outcome: Outcome) -> None:
    """Four replicas of one GPU each have the four GPUs of two nodes, nobody twice the same."""
    outcome.require_whole()
    nodes = {node for node, _ in outcome.places.values()}
    assert len(nodes) == 2
    assert sorted(outcome.places.values()) == sorted((node, gpu) for node in nodes for gpu in "01")


def test_shared_gpus(outcome: Outcome) -> None:
    """Eight replicas of half a GPU: two on each."""
    outcome.require_whole()
    shares = Counter(outcome.places.values())
    assert len(shares) == 4
    assert set(shares.values()) == {2}


def test_several_gpus(outcome: Outcome) -> None:
    """A replica of two GPUs has both on one node."""
    outcome.require_whole()
    assert {gpus for _, gpus in outcome.places.values()} == {"0,1"}
    assert len({node for node, _ in outcome.places.values()}) == 2


def test_too_many_gpus(outcome: Outcome) -> None:
    """No node has three GPUs, though the cluster has four: an error in seconds, with the numbers."""
    assert outcome.data["error"].startswith(
        "The cluster cannot hold the pool: a replica asks for 0.5 CPU and 3 GPU on one node, "
        "the cluster has 8 CPU, 4 GPU on 3 node(s), after 2 s."
    )
    assert outcome.data["seconds"] < 10
    assert outcome.data["events"] == []


def test_idle_release(outcome: Outcome) -> None:
    """While unit 0 still ran, the GPUs of the replica that was released were free."""
    outcome.require_whole()
    (released,) = outcome.of("ReplicaReleased")
    assert released["reason"] == "idle for 0.5 s"
    assert outcome.data["free"] == [2.0]
    kinds = [(event["kind"], event.get("unit")) for event in outcome.data["events"]]
    assert kinds.index(("UnitDone", 1)) < kinds.index(("ReplicaReleased", None)) < kinds.index(("UnitDone", 0))


def test_node_that_comes_and_is_killed(outcome: Outcome) -> None:
    outcome.require_whole()
    started = [event["replica"] for event in outcome.of("ReplicaStarted")]
    assert sorted(started[:3]) == [0, 1, 2]
    assert [lost["replica"] for lost in outcome.of("ReplicaLost")] == [started[2]]
    nodes = {event["receipt"]["node"] for event in outcome.of("UnitDone")}
    assert len(nodes) == 3
    charged = [event for event in outcome.of("UnitRetried") if not event["error"].startswith("not charged")]
    assert len(charged) <= 1


def test_leaving_notice(outcome: Outcome) -> None:
    """What was on the node is released, nothing is charged, and it is started again on another node."""
    outcome.require_whole()
    (told,) = outcome.data["told"]
    events = outcome.data["events"]
    released = outcome.of("ReplicaReleased")
    assert 1 <= len(released) <= 2
    assert all(event["reason"] in ("leave is there", "its node is about to go") for event in released)
    assert not outcome.of("ReplicaLost")
    assert all(event["error"].startswith("not charged") for event in outcome.of("UnitRetried"))
    assert len(outcome.of("ReplicaStarted")) == 2 + len(released)
    last = max(index for index, event in enumerate(events) if event["kind"] == "ReplicaReleased")
    after = {event["receipt"]["node"] for event in events[last:] if event["kind"] == "UnitDone"}
    assert after
    assert told not in after
