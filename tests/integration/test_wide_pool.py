"""A driver of many replicas in few processes does what a driver of as many processes does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from cluster import Event, PoolOptions, ReplicaStarted, UnitDone, WorkUnit

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

REPLICAS = 30


def test_every_replica_of_a_shared_process_does_units():
    from benchmarks.wide_pool import HOSTS, shared_backend, units_of
    from cluster.pool import Pool

    events: list[Event] = []

    def done() -> list[UnitDone]:
        return [event for event in events if isinstance(event, UnitDone)]

    def until_all_have_worked() -> Iterator[WorkUnit]:
        for unit in units_of(100_000, lambda: 0.02):
            if len({event.replica for event in done()}) == REPLICAS:
                return
            yield unit

    options = PoolOptions(replicas=REPLICAS, cpus_per_replica=0, straggler_factor=0)
    backend = shared_backend(options)
    pool = Pool(backend, options)
    try:
        assert pool.run(until_all_have_worked(), events.append)
        assert len(backend._hosts) == HOSTS < REPLICAS
    finally:
        pool.close()
    assert Counter(event.unit for event in done()) == Counter(range(len(done())))
    # The receipt names the replica that did the unit.
    assert all(event.receipt == event.replica for event in done())
    assert sum(isinstance(event, ReplicaStarted) for event in events) == REPLICAS
