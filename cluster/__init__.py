"""Where work runs: pools of stateful replicas that execute idempotent units at least once.

Everything but ``cluster.ray_pool`` works without importing Ray.
"""

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
from cluster.options import PoolOptions
from cluster.work import (
    Executor,
    Factory,
    PoolError,
    PoolHaltedError,
    ReplicaStartError,
    Stop,
    Worker,
    WorkUnit,
)

__all__ = [
    "Callback",
    "Event",
    "Executor",
    "Factory",
    "InlinePool",
    "PoolDraining",
    "PoolError",
    "PoolHaltedError",
    "PoolOptions",
    "PoolWaiting",
    "ReplicaLost",
    "ReplicaReleased",
    "ReplicaStartError",
    "ReplicaStarted",
    "Stop",
    "UnitDone",
    "UnitFailed",
    "UnitRetried",
    "UnitStarted",
    "WorkUnit",
    "Worker",
]
