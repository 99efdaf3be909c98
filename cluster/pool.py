"""A pool of Ray actors that each keep one worker, and the loop that feeds them and survives their death."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from cluster.dispatch import (
    Dispatcher,
    Executor,
    Factory,
    Lease,
    Outcome,
    PoolError,
    PoolOptions,
    ReplicaStartError,
    Worker,
    WorkUnit,
    attempt_unit,
    describe_error,
    start_failure,
)
from cluster.events import Callback, ReplicaStarted

__all__ = [
    "Executor",
    "Factory",
    "PoolError",
    "PoolOptions",
    "RayPool",
    "ReplicaStartError",
    "WorkUnit",
    "Worker",
]

_logger = logging.getLogger(__name__)
_LOSSES = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)


class _Replica:
    """The actor: builds the worker on request and runs units on it.

    The worker is built in a method, not in ``__init__``, so that a raising factory is an answer rather than a dead
    actor, and errors travel as text, so that an exception that cannot be pickled still tells its story.
    """

    def __init__(self, factory: Factory) -> None:
        self._factory = factory
        self._worker: Worker | None = None

    # Retried by Ray, as this call may find the process dead or still restarting; bounded by max_restarts.
    @ray.method(max_task_retries=-1)
    def start(self) -> str | None:
        """Build the worker unless it lives; return the text of the error if that fails."""
        if self._worker is None:
            try:
                self._worker = self._factory()
            except (Exception, SystemExit) as error:
                _logger.warning("The factory of the worker raised.", exc_info=True)
                return describe_error(error)
        return None

    def run(self, payload: Any) -> Outcome | None:
        """Run one unit; None when the process is a new one that has no worker yet."""
        return None if self._worker is None else attempt_unit(self._worker, payload)


@dataclass(slots=True, eq=False)
class _Handle:
    """What the driver knows of one replica."""

    actor: Any
    deadline: float
    starting: Any | None = None
    failures: int = 0
    has_started: bool = False

    @property
    def up(self) -> bool:
        return self.starting is None


class RayPool:
    """Runs units on Ray actors, keeping them between runs until ``close``.

    Ray must be connected before ``run`` is called, and stays connected. An exception that leaves ``run``, an
    interrupt included, closes the pool first.

    Parameters
    ----------
    factory : builds the worker, in the process of each replica.
    options : size and patience of the pool.
    """

    def __init__(self, factory: Factory, options: PoolOptions | None = None) -> None:
        self._factory = factory
        self._options = options or PoolOptions()
        if self._options.replicas < 1:
            raise ValueError("A Ray pool needs replicas: 0 were asked for. Use 1 or more, or the in-process pool.")
        self._replicas: dict[int, _Handle] = {}
        self._calls: dict[Any, Lease] = {}
        self._last_loss = ""

    def run(self, units: Iterable[WorkUnit], on_event: Callback) -> None:
        """Run all units, reporting each as done or failed once.

        Raises
        ------
        PoolError
            when Ray is not connected, when the cluster cannot hold the pool, or when no replica is left.
        ReplicaStartError
            when a replica never came up: its factory raised or died too often, or it took too long.
        """
        dispatcher = Dispatcher(units, self._options, on_event)
        if dispatcher.finished:
            return
        try:
            self._open()
            while not dispatcher.finished:
                self._require_replicas()
                self._fill_windows(dispatcher)
                self._await_answer(dispatcher, on_event)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the actors of this pool, and nothing else; a later run starts new ones."""
        handles = list(self._replicas.values())
        self._replicas.clear()
        self._calls.clear()
        if ray.is_initialized():
            for handle in handles:
                ray.kill(handle.actor, no_restart=True)

    def _open(self) -> None:
        """Create the replicas that do not exist yet."""
        if not ray.is_initialized():
            raise PoolError("Ray is not connected: a pool does not start Ray itself. Call ray.init() before run().")
        for handle in self._replicas.values():
            handle.deadline = time.monotonic() + self._options.start_timeout_s
        missing = [index for index in range(self._options.replicas) if index not in self._replicas]
        if not missing:
            return
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        require_capacity(self._options, nodes)
        actor_class = ray.remote(_Replica).options(
            num_cpus=self._options.cpus_per_replica,
            num_gpus=self._options.gpus_per_replica,
            max_restarts=self._options.max_restarts,
            max_task_retries=0,
        )
        for index in missing:
            handle = _Handle(actor_class.remote(self._factory), deadline=math.inf)
            self._replicas[index] = handle
            self._begin_start(handle)

    def _require_replicas(self) -> None:
        if not self._replicas:
            raise PoolError(
                f"No replica is left: all {self._options.replicas} died, the last with {self._last_loss}. "
                f"Find the cause in the logs of Ray, or raise max_restarts ({self._options.max_restarts}), then resume."
            )

    def _begin_start(self, handle: _Handle) -> None:
        handle.deadline = time.monotonic() + self._options.start_timeout_s
        handle.starting = handle.actor.start.remote()

    def _fill_windows(self, dispatcher: Dispatcher) -> None:
        """Submit units one by one around the replicas, so that none fills its window before another has work."""
        submitted = True
        while submitted:
            submitted = False
            for index, handle in self._replicas.items():
                if handle.up and (lease := dispatcher.take(index)) is not None:
                    self._calls[handle.actor.run.remote(lease.unit.payload)] = lease
                    submitted = True

    def _await_answer(self, dispatcher: Dispatcher, on_event: Callback) -> None:
        starts = {handle.starting: index for index, handle in self._replicas.items() if not handle.up}
        patience = None
        if starts:
            nearest = min(self._replicas[index].deadline for index in starts.values())
            patience = max(0.0, nearest - time.monotonic())
        ready, _ = ray.wait([*starts, *self._calls], num_returns=1, timeout=patience)
        for answer in ready:
            if answer in starts:
                self._receive_start(starts[answer], answer, dispatcher, on_event)
            else:
                self._receive_outcome(answer, dispatcher)
        self._expire_starts(dispatcher)

    def _receive_start(self, index: int, answer: Any, dispatcher: Dispatcher, on_event: Callback) -> None:
        handle = self._replicas[index]
        try:
            error: str | None = ray.get(answer)
        except RayError as loss:
            # Ray has retried across restarts, so what arrives here is final.
            self._give_up(index, describe_error(loss), dispatcher)
            return
        if error is None:
            handle.starting, handle.failures, handle.has_started = None, 0, True
            on_event(ReplicaStarted(replica=index))
            return
        handle.failures += 1
        if handle.failures >= self._options.max_attempts:
            self._give_up(index, error, dispatcher, handle.failures)
        else:
            dispatcher.lose(index, error)
            self._begin_start(handle)

    def _receive_outcome(self, answer: Any, dispatcher: Dispatcher) -> None:
        lease = self._calls.pop(answer)
        try:
            outcome: Outcome | None = ray.get(answer)
        except ActorDiedError as loss:
            self._salvage(lease.replica, dispatcher)
            self._drop(lease.replica, describe_error(loss), dispatcher)
        except _LOSSES as loss:
            self._restart(lease.replica, describe_error(loss), dispatcher)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            dispatcher.settle(lease, Outcome(seconds=0.0, error=describe_error(cause)))
        else:
            if outcome is None:
                self._restart(lease.replica, "the process restarted while it was idle", dispatcher)
            else:
                dispatcher.settle(lease, outcome)

    def _restart(self, index: int, error: str, dispatcher: Dispatcher) -> None:
        self._salvage(index, dispatcher)
        dispatcher.lose(index, error)
        self._begin_start(self._replicas[index])

    def _salvage(self, index: int, dispatcher: Dispatcher) -> None:
        """Settle what a lost replica has answered before, and forget its other calls."""
        answers = [answer for answer, lease in self._calls.items() if lease.replica == index]
        if not answers:
            return
        ready, _ = ray.wait(answers, num_returns=len(answers), timeout=0)
        leases = {answer: self._calls.pop(answer) for answer in answers}
        for answer in ready:
            try:
                outcome: Outcome | None = ray.get(answer)
            except RayError:
                continue
            if outcome is not None:
                dispatcher.settle(leases[answer], outcome)

    def _expire_starts(self, dispatcher: Dispatcher) -> None:
        now = time.monotonic()
        for index, handle in list(self._replicas.items()):
            if handle.up or handle.deadline > now or ray.wait([handle.starting], timeout=0)[0]:
                continue
            error = f"no answer within start_timeout_s ({self._options.start_timeout_s:g} s), {_ask(self._options)}"
            self._give_up(index, error, dispatcher)

    def _give_up(self, index: int, error: str, dispatcher: Dispatcher, attempts: int = 1) -> None:
        """End a replica that cannot start: the fault of the run if it never did, its own if it has worked before."""
        has_started = self._replicas[index].has_started
        self._drop(index, error, dispatcher)
        if not has_started:
            raise ReplicaStartError(start_failure(index, error, attempts))

    def _drop(self, index: int, error: str, dispatcher: Dispatcher) -> None:
        self._last_loss = error
        ray.kill(self._replicas.pop(index).actor, no_restart=True)
        dispatcher.lose(index, error)


def require_capacity(options: PoolOptions, nodes: Iterable[Mapping[str, float]]) -> None:
    """Raise unless the nodes, when idle, hold all replicas; Ray itself would wait for ever.

    Parameters
    ----------
    nodes : total resources of each living node, by the names that Ray gives them.
    """
    nodes = list(nodes)
    if sum(_replicas_on(node, options) for node in nodes) >= options.replicas:
        return
    has = ", ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}" for name in ("CPU", "GPU"))
    raise PoolError(
        f"The cluster cannot hold the pool: {_ask(options)}, the cluster has {has} on {len(nodes)} node(s). "
        "Ask for fewer or smaller replicas, or add nodes before the run."
    )


def _replicas_on(node: Mapping[str, float], options: PoolOptions) -> float:
    gpus = options.gpus_per_replica
    by_cpu = _times(node.get("CPU", 0), options.cpus_per_replica)
    # A share of a GPU cannot be put together from two devices.
    by_gpu = node.get("GPU", 0) * _times(1, gpus) if 0 < gpus < 1 else _times(node.get("GPU", 0), gpus)
    return min(by_cpu, by_gpu)


def _times(total: float, share: float) -> float:
    # Rounded first, as 1 // 0.2 is 4 in binary fractions.
    return math.floor(round(total / share, 6)) if share else math.inf


def _ask(options: PoolOptions) -> str:
    return (
        f"asked for {options.replicas} replica(s) of "
        f"{options.cpus_per_replica:g} CPU and {options.gpus_per_replica:g} GPU"
    )
