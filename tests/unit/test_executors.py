"""Where units run: what a Ray of this machine must have for the pool that a config asks for."""

from __future__ import annotations

import pytest

from cluster import PoolOptions
from cluster.ray_pool import places_on
from pipeline.executors import local_cpus


@pytest.mark.parametrize("replicas", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("share", [0, 0.1, 0.25, 0.4, 0.5, 0.7, 1, 1.4, 1.5, 2, 3])
def test_every_replica_finds_a_place_on_a_local_ray(replicas, share):
    options = PoolOptions(replicas=replicas, cpus_per_replica=share)
    cpus = local_cpus(options)
    assert places_on({"CPU": cpus}, options) == replicas
    assert cpus == 1 or places_on({"CPU": cpus - 1}, options) < replicas, "no more than needed"
