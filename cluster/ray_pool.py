"""Replicas as Ray actors: one process each, which builds a worker, runs units and watches for notices."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeLabelSchedulingStrategy, NotIn

from cluster.backend import Answer, BuildFailed, Built, Died, Finished, Leaving, Placed
from cluster.events import Callback
from cluster.notice import watch_for
from cluster.options import PoolOptions
from cluster.pool import Pool
from cluster.work import (
    Factory,
    Outcome,
    PoolError,
    Stop,
    Worker,
    WorkUnit,
    attempt_unit,
    describe_error,
    never,
)

__all__ = ["RayBackend", "RayPool", "places_on"]

_logger = logging.getLogger(__name__)
_LOSSES = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)
_NOTICE_S = 2.0
_NODE_ID = "ray.io/node-id"
_SHORT_S = 0.02
"""Units shorter than this share a call, which costs about a millisecond; the answers of a call come together."""


class _Started(NamedTuple):
    hardware: str = ""
    error: str | None = None


class _Replica:
    """The actor: builds the worker on request and runs units on it.

    The worker is built in a method, not in ``__init__``, so that a raising factory is an answer rather than a dead
    actor, and errors travel as text, so that an exception that cannot be pickled still tells its story.
    """

    def __init__(self, factory: Factory, notices: Sequence[str]) -> None:
        self._factory, self._notices = factory, notices
        self._worker: Worker | None = None
        self._leaving = threading.Event()

    def place(self) -> str:
        """Return the id of the node, which shows that there is one."""
        return str(ray.get_runtime_context().get_node_id())

    def start(self) -> _Started:
        """Build the worker."""
        try:
            self._worker = self._factory()
        except (Exception, SystemExit) as error:
            _logger.warning("The factory of the worker raised.", exc_info=True)
            return _Started(error=describe_error(error))
        return _Started(hardware=str(getattr(self._worker, "hardware", "")))

    def run(self, payloads: Sequence[Any]) -> list[Outcome]:
        """Run units one after the other, unless the node is about to go."""
        return [self._run(payload) for payload in payloads]

    def _run(self, payload: Any) -> Outcome:
        if self._leaving.is_set() or self._worker is None:
            return Outcome(seconds=0.0, refused=True)
        return attempt_unit(self._worker, payload)

    @ray.method(concurrency_group="watch")
    def watch(self) -> str:
        """Return when the node is told that it will go, and why.

        While it does not return, its failure is how the death of an idle process is heard of.
        """
        notice, never = watch_for(self._notices), threading.Event()
        while not self._notices:
            never.wait()
        while (reason := notice()) is None:
            never.wait(_NOTICE_S)
        self._leaving.set()
        return reason


@dataclass(frozen=True, slots=True)
class _Call:
    kind: Literal["place", "start", "watch", "run"]
    replica: int
    tickets: tuple[int, ...] = ()


class RayBackend:
    """A backend of Ray actors, which are never restarted by Ray itself. Ray must be connected, and stays connected.

    Parameters
    ----------
    factory : builds the worker, in the process of each replica.
    notices : where nodes learn that they will go; see ``cluster.notice``.
    """

    def __init__(self, factory: Factory, options: PoolOptions, notices: Sequence[str] = ()) -> None:
        watch_for(notices)
        self._factory, self._options, self._notices = factory, options, tuple(notices)
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, _Call] = {}
        self._nodes: dict[int, str] = {}
        self._shunned: set[str] = set()
        self._outbox: dict[int, list[tuple[int, Any]]] = {}
        self._paces: dict[int, float] = {}

    def open(self) -> None:
        """Check that Ray is connected."""
        if not ray.is_initialized():
            raise PoolError("Ray is not connected: a pool does not start Ray itself. Call ray.init() before run().")

    def capacity(self) -> tuple[int, str]:
        """Return how many replicas the living nodes could hold if they were idle, and a text that says so."""
        nodes = [
            node["Resources"]
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"] and node["NodeID"] not in self._shunned
        ]
        places = sum(places_on(node, self._options) for node in nodes)
        has = ", ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}" for name in ("CPU", "GPU"))
        asks = f"{self._options.cpus_per_replica:g} CPU and {self._options.gpus_per_replica:g} GPU"
        text = f"a replica asks for {asks} on one node, the cluster has {has} on {len(nodes)} node(s)"
        return int(min(places, self._options.replicas)), text

    def spawn(self, replica: int) -> None:
        """Create an actor; Ray keeps looking for a place for it, which is also what an autoscaler goes by."""
        placement = {}
        if self._shunned:
            elsewhere = NodeLabelSchedulingStrategy(hard={_NODE_ID: NotIn(*sorted(self._shunned))})
            placement["scheduling_strategy"] = elsewhere
        actor = (
            ray.remote(concurrency_groups={"watch": 1})(_Replica)
            .options(
                num_cpus=self._options.cpus_per_replica,
                num_gpus=self._options.gpus_per_replica,
                max_restarts=0,
                max_task_retries=0,
                **placement,
            )
            .remote(self._factory, self._notices)
        )
        self._actors[replica] = actor
        self._calls[actor.place.remote()] = _Call("place", replica)
        self._calls[actor.start.remote()] = _Call("start", replica)
        self._calls[actor.watch.remote()] = _Call("watch", replica)

    def kill(self, replica: int, *, shun_node: bool = False) -> None:
        """Kill an actor and forget what it was asked."""
        node = self._nodes.pop(replica, None)
        if shun_node and node is not None:
            self._shunned.add(node)
        actor = self._actors.pop(replica, None)
        self._calls = {ref: call for ref, call in self._calls.items() if call.replica != replica}
        self._outbox.pop(replica, None)
        self._paces.pop(replica, None)
        if actor is not None and ray.is_initialized():
            ray.kill(actor, no_restart=True)

    def send(self, replica: int, ticket: int, payload: Any) -> None:
        """Queue a payload at an actor; sent with the next ``wait``."""
        self._outbox.setdefault(replica, []).append((ticket, payload))

    def wait(self, timeout_s: float) -> list[Answer]:
        """Return everything answered, outcomes before deaths."""
        self._send_off()
        refs = list(self._calls)
        if not refs:
            time.sleep(timeout_s)
            return []
        ready, rest = ray.wait(refs, num_returns=1, timeout=timeout_s, fetch_local=False)
        if ready and rest:
            ready += ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        answers: list[Answer] = []
        deaths: dict[int, Died] = {}
        answered = set(ready)
        # In the order in which they were asked, which Ray does not keep.
        for ref in [ref for ref in refs if ref in answered]:
            for answer in self._receive(ref, self._calls.pop(ref)):
                if isinstance(answer, Died):
                    deaths.setdefault(answer.replica, answer)
                else:
                    answers.append(answer)
        return [*answers, *deaths.values()]

    def close(self) -> None:
        """Kill every actor of this backend."""
        for replica in list(self._actors):
            self.kill(replica)

    def _send_off(self) -> None:
        for replica, letters in self._outbox.items():
            size = len(letters) if self._paces.get(replica, _SHORT_S) < _SHORT_S else 1
            for start in range(0, len(letters), size):
                tickets, payloads = zip(*letters[start : start + size], strict=True)
                ref = self._actors[replica].run.remote(payloads)
                self._calls[ref] = _Call("run", replica, tickets)
        self._outbox.clear()

    def _receive(self, ref: Any, call: _Call) -> list[Answer]:
        try:
            value = ray.get(ref)
        except _LOSSES as loss:
            return [Died(replica=call.replica, error=describe_error(loss))]
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            return self._failure(call, describe_error(cause))
        return self._understand(call, value)

    def _failure(self, call: _Call, error: str) -> list[Answer]:
        """Return what it means that a call raised, which workers do not do: Ray could not carry its answer."""
        if call.kind == "start":
            return [BuildFailed(replica=call.replica, error=error)]
        if len(call.tickets) > 1:
            # One receipt of several could not be carried; alone, each shows whether it is the one.
            self._paces[call.replica] = _SHORT_S
            return self._finished(call, [Outcome(seconds=0.0, refused=True) for _ in call.tickets])
        return self._finished(call, [Outcome(seconds=0.0, error=error) for _ in call.tickets])

    def _understand(self, call: _Call, value: Any) -> list[Answer]:
        match call.kind:
            case "place":
                self._nodes[call.replica] = value
                return [Placed(replica=call.replica)]
            case "start" if value.error is not None:
                return [BuildFailed(replica=call.replica, error=value.error)]
            case "start":
                return [Built(replica=call.replica, hardware=value.hardware)]
            case "watch":
                return [Leaving(replica=call.replica, reason=value)]
            case "run":
                self._paces[call.replica] = max(outcome.seconds for outcome in value)
                answers = self._finished(call, value)
                # Heard with the refusal, or units would be sent to and fro until the watch answers.
                if any(outcome.refused for outcome in value):
                    answers.append(Leaving(replica=call.replica, reason="its node is about to go"))
                return answers

    @staticmethod
    def _finished(call: _Call, outcomes: Sequence[Outcome]) -> list[Answer]:
        pairs = zip(call.tickets, outcomes, strict=True)
        return [Finished(replica=call.replica, ticket=ticket, outcome=outcome) for ticket, outcome in pairs]


class RayPool(Pool):
    """A pool on Ray actors; see ``Pool`` and ``RayBackend``."""

    def __init__(self, factory: Factory, options: PoolOptions | None = None, notices: Sequence[str] = ()) -> None:
        options = options or PoolOptions()
        super().__init__(RayBackend(factory, options, notices), options)

    def run(self, units: Iterable[WorkUnit], on_event: Callback, stop: Stop = never) -> bool:
        """Run all units; see ``Pool.run``.

        Raises
        ------
        PoolError : also if Ray itself does not answer any more.
        """
        try:
            return super().run(units, on_event, stop)
        except RayError as error:
            raise PoolError(
                f"the Ray cluster stopped answering: {describe_error(error)}. "
                "Finished units are safe; run the same command again once it is back."
            ) from error


def places_on(node: Mapping[str, float], options: PoolOptions) -> float:
    """Return how many replicas an idle node could hold.

    Parameters
    ----------
    node : total resources by the names that Ray gives them.
    """
    gpus = options.gpus_per_replica
    by_cpu = _times(node.get("CPU", 0), options.cpus_per_replica)
    # A share of a GPU cannot be put together from two devices.
    by_gpu = node.get("GPU", 0) * _times(1, gpus) if 0 < gpus < 1 else _times(node.get("GPU", 0), gpus)
    return min(by_cpu, by_gpu, options.replicas)


def _times(total: float, share: float) -> float:
    # Rounded first, as 1 // 0.2 is 4 in binary fractions.
    return math.floor(round(total / share, 6)) if share else math.inf
