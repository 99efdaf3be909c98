"""Where units run: a Ray of this machine has a CPU for every replica, and one that is not there is one sentence."""

from __future__ import annotations

import pytest
import ray

from cluster import PoolError, PoolOptions
from cluster.ray_pool import places_on
from pipeline import executors
from pipeline.executors import local_cpus


@pytest.mark.parametrize("replicas", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("share", [0, 0.1, 0.25, 0.4, 0.5, 0.7, 1, 1.4, 1.5, 2, 3])
def test_every_replica_finds_a_place_on_a_local_ray(replicas, share):
    options = PoolOptions(replicas=replicas, cpus_per_replica=share)
    cpus = local_cpus(options)
    assert places_on({"CPU": cpus}, options) == replicas
    assert cpus == 1 or places_on({"CPU": cpus - 1}, options) < replicas, "no more than needed"


class TestAddress:
    @pytest.fixture(autouse=True)
    def disconnected(self, monkeypatch):
        monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def test_nobody_there_is_said_before_ray_tries_for_minutes(self, monkeypatch):
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
        monkeypatch.setattr(ray, "init", lambda **given: pytest.fail("Ray was asked"))
        with pytest.raises(PoolError, match=r"^no Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:9: .*refused\. "):
            executors._connect(PoolOptions())

    @pytest.mark.parametrize("address", ["auto", "ray://head:10001", "local"])
    def test_other_addresses_are_left_to_ray(self, monkeypatch, address):
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(ray, "init", lambda **given: None)
        assert executors._connect(PoolOptions()) == "cluster"

    @pytest.mark.parametrize(
        "error", [ray.exceptions.AuthenticationError("no token"), ConnectionError("gone"), ValueError("no address")]
    )
    def test_a_cluster_that_refuses_is_one_sentence(self, monkeypatch, error):
        def refuse(**given):
            raise error

        monkeypatch.setenv("RAY_ADDRESS", "auto")
        monkeypatch.setattr(ray, "init", refuse)
        with pytest.raises(
            PoolError, match=r"no Ray cluster answers at RAY_ADDRESS=auto: .*(no token|gone|no address)"
        ):
            executors._connect(PoolOptions())
