"""The pool without processes: the same units, attempts and events, one after the other in this process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from cluster.dispatch import (
    Dispatcher,
    Factory,
    PoolOptions,
    ReplicaStartError,
    Worker,
    WorkUnit,
    attempt_unit,
    describe_error,
    start_failure,
)
from cluster.events import Callback, ReplicaLost, ReplicaStarted

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
        self._options = replace(options or PoolOptions(), replicas=1, in_flight=1)
        self._worker: Worker | None = None

    def run(self, units: Iterable[WorkUnit], on_event: Callback) -> None:
        """Run all units in this thread.

        Raises
        ------
        ReplicaStartError
            when the factory has raised ``max_attempts`` times.
        """
        dispatcher = Dispatcher(units, self._options, on_event)
        if dispatcher.finished:
            return
        if self._worker is None:
            self._worker = self._start(on_event)
        try:
            while (lease := dispatcher.take(_REPLICA)) is not None:
                dispatcher.settle(lease, attempt_unit(self._worker, lease.unit.payload))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Drop the worker; a later run builds another one."""
        self._worker = None

    def _start(self, on_event: Callback) -> Worker:
        failures = 0
        while True:
            try:
                worker = self._factory()
            except Exception as error:
                failures += 1
                on_event(ReplicaLost(replica=_REPLICA, error=describe_error(error)))
                if failures == self._options.max_attempts:
                    raise ReplicaStartError(start_failure(_REPLICA, describe_error(error), failures)) from error
            else:
                on_event(ReplicaStarted(replica=_REPLICA))
                return worker
