"""The pool without processes: the same units, attempts and events, one after the other in this process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from cluster.dispatch import Dispatcher
from cluster.events import Callback, ReplicaLost, ReplicaStarted
from cluster.options import PoolOptions
from cluster.work import (
    Factory,
    PoolHaltedError,
    ReplicaStartError,
    Stop,
    Worker,
    WorkUnit,
    attempt_unit,
    describe_error,
    never,
    start_failure,
)

_REPLICA = 0


class InlinePool:
    """Runs units in this process on one worker, which is built at the first unit and kept until ``close``.

    An exception that leaves ``run``, an interrupt included, drops the worker first.

    Parameters
    ----------
    factory : builds the worker.
    options : only ``max_attempts`` matters here; there is one replica, which holds one unit.
    """

    def __init__(self, factory: Factory, options: PoolOptions | None = None) -> None:
        self._factory = factory
        self._options = replace(options or PoolOptions(), replicas=1, in_flight=1, max_restarts=0)
        self._worker: Worker | None = None

    def run(self, units: Iterable[WorkUnit], on_event: Callback, stop: Stop = never) -> bool:
        """Run all units in this thread; a reason to stop is asked for between them. See ``Executor.run``.

        Raises
        ------
        ReplicaStartError : the factory has raised ``max_attempts`` times.
        PoolHaltedError : the worker met something that would meet every unit.
        """
        dispatcher = Dispatcher(units, self._options, on_event)
        if dispatcher.finished:
            return True
        if self._worker is None:
            self._worker = self._start(on_event)
        dispatcher.join(_REPLICA)
        try:
            while stop() is None and (lease := dispatcher.take(_REPLICA)) is not None:
                outcome = attempt_unit(self._worker, lease.unit.payload)
                dispatcher.settle(lease, outcome)
                if outcome.halts:
                    raise PoolHaltedError(outcome.error)
        except BaseException:
            self.close()
            raise
        return dispatcher.finished

    def close(self) -> None:
        """Drop the worker; a later run builds another one."""
        self._worker = None

    def _start(self, on_event: Callback) -> Worker:
        failures = 0
        while True:
            try:
                worker = self._factory()
            except (Exception, SystemExit) as error:
                failures += 1
                last = failures == self._options.max_attempts
                # There is no other process to hope for, so there is no pause either.
                on_event(ReplicaLost(replica=_REPLICA, error=describe_error(error), again_in_s=None if last else 0.0))
                if last:
                    raise ReplicaStartError(start_failure(_REPLICA, describe_error(error), failures)) from error
            else:
                on_event(ReplicaStarted(replica=_REPLICA, hardware=str(getattr(worker, "hardware", ""))))
                return worker
