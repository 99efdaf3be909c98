"""What a pool runs and on what: units of work, workers, the outcome of an attempt, and the errors of a pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from cluster.events import Callback

_ERROR_CHARACTERS = 500


class PoolError(RuntimeError):
    """The pool cannot run its units; the ones that it reported done stay done."""


class ReplicaStartError(PoolError):
    """A replica could not be constructed."""


class PoolHaltedError(PoolError):
    """A worker met something that every other unit would meet too, such as a full disk."""


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A piece of work that may run more than once with the same outcome.

    Attributes
    ----------
    id : name of the unit in events; unique within a run.
    locality : units of equal locality share state worth keeping in a replica, such as a recorded run.
    payload : what the worker gets; small, as it is sent to the replica.
    weight : expected cost relative to other units, to tell a straggler from a large unit.
    """

    id: int
    locality: Hashable
    payload: Any
    weight: float = 1.0


class Worker(Protocol):
    """The state of one replica, built once in its process.

    A worker may have an attribute ``hardware``, a text; units are copied only between workers of equal hardware.
    An exception with a true attribute ``halts_pool`` ends the run without any unit being charged for it.
    """

    def run(self, payload: Any) -> Any:
        """Do the unit and return a small receipt of it."""


Factory: TypeAlias = Callable[[], Worker]
Stop: TypeAlias = Callable[[], str | None]


def never() -> str | None:
    """Return no reason to stop."""
    return None


class Executor(Protocol):
    """Runs units at least once each and reports every one as done or failed exactly once."""

    def run(self, units: Iterable[WorkUnit], on_event: Callback, stop: Stop = never) -> bool:
        """Run all units, pulling them from the iterable as they are needed.

        Parameters
        ----------
        stop : asked about once a second for a reason to stop; then no unit is handed out any more.

        Returns
        -------
        Whether every unit has ended, which is false only if the run was stopped.
        """

    def close(self) -> None:
        """Give up the replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one attempt: a receipt, or the text of an error.

    Attributes
    ----------
    halts : the error would meet every unit.
    refused : the unit was not tried, as its replica is about to go.
    """

    seconds: float
    receipt: Any = None
    error: str | None = None
    halts: bool = False
    refused: bool = False


def attempt_unit(worker: Worker, payload: Any) -> Outcome:
    """Run a payload and turn whatever the worker raises into an outcome.

    ``SystemExit`` counts as an error of the unit: a library that calls ``sys.exit`` must not take a replica along.
    """
    began = time.perf_counter()
    try:
        receipt = worker.run(payload)
    except (Exception, SystemExit) as error:
        halts = bool(getattr(error, "halts_pool", False))
        return Outcome(seconds=time.perf_counter() - began, error=describe_error(error), halts=halts)
    return Outcome(seconds=time.perf_counter() - began, receipt=receipt)


def describe_error(error: BaseException) -> str:
    """Return the type and text of an error in one line of limited length."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if len(line) <= _ERROR_CHARACTERS:
        return line
    # A text that quotes a traceback has its point at the end.
    half = _ERROR_CHARACTERS // 2
    return f"{line[: half - 5]} ... {line[-half:]}"


def start_failure(replica: int, error: str, attempts: int = 1) -> str:
    """Return the message for a replica that does not start."""
    tried = f" (tried {attempts} times)" if attempts > 1 else ""
    return f"Replica {replica} cannot start{tried}: {error}. Repair the cause and run again."
