"""What a pool tells its observers: one small value for each change of a unit, of a replica or of the pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitStarted:
    """A replica has begun an attempt at a unit.

    A unit that waits in the window of a replica has not started, so every start that is no copy is followed by exactly
    one of ``UnitDone``, ``UnitRetried`` and ``UnitFailed``, unless the run itself ends before.

    Attributes
    ----------
    copy : whether another replica runs the same attempt, and this one was started because that takes long.
    """

    unit: int
    replica: int
    attempt: int
    copy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitDone:
    """A unit has finished; told once for each unit, however many copies of it ran.

    Attributes
    ----------
    seconds : time the worker took, measured in the replica.
    receipt : what the worker returned.
    """

    unit: int
    replica: int
    attempt: int
    seconds: float
    receipt: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRetried:
    """An attempt has failed, died with its replica or outlived its lease, and the unit waits for another one."""

    unit: int
    replica: int
    attempt: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFailed:
    """The last attempt at a unit has failed; it is parked with its error, and the run goes on without it."""

    unit: int
    attempts: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStarted:
    """A replica has built its worker, for the first time or again after a loss.

    Attributes
    ----------
    hardware : what the worker says that it runs on; units are copied only between replicas that say the same.
    """

    replica: int
    hardware: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLost:
    """A replica has died, hung or could not build its worker.

    Attributes
    ----------
    again_in_s : seconds until it is started again; None if it is given up.
    """

    replica: int
    error: str
    again_in_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReleased:
    """A replica was ended on purpose, with nothing of its work lost: it was idle, or its node is about to go."""

    replica: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolWaiting:
    """No replica has a place yet, although the cluster, or the cluster as it may grow, can hold one."""

    seconds: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolDraining:
    """No unit is handed out any more; those that run may finish within a limit."""

    units: int
    limit_s: float


Event: TypeAlias = (
    UnitStarted
    | UnitDone
    | UnitRetried
    | UnitFailed
    | ReplicaStarted
    | ReplicaLost
    | ReplicaReleased
    | PoolWaiting
    | PoolDraining
)
Callback: TypeAlias = Callable[[Event], None]
