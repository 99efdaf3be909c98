"""Size and patience of a pool."""

from __future__ import annotations

from dataclasses import dataclass, fields

_LEAST = {"in_flight": 1, "max_attempts": 1}
MAX_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """Size and patience of a pool.

    Attributes
    ----------
    replicas : worker processes at most; 0 means none, for the in-process pool. Fewer run where there is less to do or
        fewer find a place.
    cpus_per_replica, gpus_per_replica : resources reserved for each of them.
    in_flight : units a replica holds at once: one running, the others waiting.
    max_attempts : times a unit is tried before it counts as failed, and times a factory is called in a row.
    max_restarts : times in a row that one replica may be lost without a finished unit in between.
    backoff_s : wait before a lost replica starts again; doubled with every further loss in a row, a minute at most.
    start_timeout_s : seconds a replica that has a place may take to construct its worker.
    capacity_wait_s : seconds to wait for nodes that can hold a replica, while there are none.
    lease_s : seconds that a unit may run; after them its replica counts as hung and is killed.
    straggler_factor : times the expected time after which an idle replica copies one of the last units; 0 for never.
    idle_release_s : seconds a replica waits for work before it is released.
    drain_s : seconds that running units get to finish when the run is stopped.
    """

    replicas: int = 1
    cpus_per_replica: float = 1
    gpus_per_replica: float = 0
    in_flight: int = 2
    max_attempts: int = 3
    max_restarts: int = 5
    backoff_s: float = 1
    start_timeout_s: float = 300
    capacity_wait_s: float = 20
    lease_s: float = 3600
    straggler_factor: float = 3
    idle_release_s: float = 60
    drain_s: float = 120

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), _LEAST.get(field.name, 0)
            if not value >= least:
                raise ValueError(f"PoolOptions.{field.name} is too small: {value!r}. Use {least} or more.")

    def backoff(self, losses: int) -> float:
        """Return the seconds to wait after a number of losses in a row."""
        return min(MAX_BACKOFF_S, self.backoff_s * 2.0 ** min(losses - 1, 30))
