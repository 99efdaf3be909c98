"""What a pool tells its observers: one small value for each change of a unit or of a replica."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitStarted:
    """A replica has begun an attempt at a unit.

    A unit that waits in the window of a replica has not started, so every start is followed by exactly one of
    ``UnitDone``, ``UnitRetried`` and ``UnitFailed``, unless the run itself ends with an exception.
    """

    unit: int
    replica: int
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitDone:
    """A unit has finished; told once for each unit.

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
    """An attempt has failed or died with its replica, and the unit waits for another one."""

    unit: int
    replica: int
    attempt: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFailed:
    """The last attempt at a unit has failed; the run goes on without it."""

    unit: int
    attempts: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStarted:
    """A replica has built its worker, for the first time or again after a loss."""

    replica: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLost:
    """A replica has died or could not build its worker; it may start again."""

    replica: int
    error: str


Event: TypeAlias = UnitStarted | UnitDone | UnitRetried | UnitFailed | ReplicaStarted | ReplicaLost
Callback: TypeAlias = Callable[[Event], None]
