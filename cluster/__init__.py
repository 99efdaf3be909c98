"""Where work runs: pools of stateful replicas that execute idempotent units at least once.

Everything but ``cluster.pool.RayPool`` works without importing Ray.
"""

from cluster.dispatch import Executor, Factory, PoolError, PoolOptions, ReplicaStartError, Worker, WorkUnit
from cluster.events import (
    Callback,
    Event,
    PoolDraining,
    PoolWaiting,
    ReplicaLost,
    ReplicaReleased,
    ReplicaStarted,
    UnitDone,
    UnitFailed,
    UnitRetried,
    UnitStarted,
)
from cluster.inline import InlinePool

__all__ = [
    "Callback",
    "Event",
    "Executor",
    "Factory",
    "InlinePool",
    "PoolDraining",
    "PoolError",
    "PoolOptions",
    "PoolWaiting",
    "ReplicaLost",
    "ReplicaReleased",
    "ReplicaStartError",
    "ReplicaStarted",
    "UnitDone",
    "UnitFailed",
    "UnitRetried",
    "UnitStarted",
    "WorkUnit",
    "Worker",
]
