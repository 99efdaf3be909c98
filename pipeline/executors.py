"""Where the units of a sweep run: in this process, on a Ray started here, or on a cluster."""

from __future__ import annotations

import functools
import logging
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

from cluster import Executor, InlinePool, PoolError, PoolOptions
from pipeline.plan import Plan
from pipeline.start_cost import remember_start
from pipeline.store import Place, locate

MakeExecutor: TypeAlias = Callable[[Plan, Place], Executor]

_LISTENER_S = 10.0

# Replicas inherit these: glibc would otherwise give every forward's buffers back to the system.
ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
}


def pool_options(plan: Plan) -> PoolOptions:
    """Return the pool options that a config asks for."""
    run = plan.config.run
    return PoolOptions(
        replicas=max(1, run.replicas),
        cpus_per_replica=run.cpus_per_replica,
        gpus_per_replica=run.gpus_per_replica,
        max_attempts=run.max_attempts,
        max_restarts=run.max_restarts,
        start_timeout_s=run.start_timeout_s,
        capacity_wait_s=run.capacity_wait_s,
        lease_s=run.lease_s,
        straggler_factor=run.straggler_factor,
        idle_release_s=run.idle_release_s,
        drain_s=run.drain_s,
    )


def inline_executor(plan: Plan, place: Place) -> Executor:
    """Run units in this process, without Ray."""
    return InlinePool(_factory(plan, place), pool_options(plan))


def ray_executor(plan: Plan, place: Place) -> Executor:
    """Run units on Ray actors: the cluster at ``RAY_ADDRESS`` if that is set, else a local one started here.

    Raises
    ------
    PoolError : no cluster answers at ``RAY_ADDRESS``.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    began = time.perf_counter()
    from cluster.ray_pool import RayPool

    options = pool_options(plan)
    if _connect(options) == "local":
        remember_start(time.perf_counter() - began)
        # Nobody adds nodes to a Ray of this machine.
        options = replace(options, capacity_wait_s=0)
    return RayPool(_factory(plan, place), options, plan.config.run.notices)


def _connect(options: PoolOptions) -> str:
    """Connect to Ray and return to which: "local", "cluster", or "given" if it is connected already."""
    import ray

    if ray.is_initialized():
        return "given"
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            _require_listener(address)
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except (ray.exceptions.RayError, OSError, OverflowError, RuntimeError, ValueError) as error:
            raise PoolError(
                f"no Ray cluster answers at RAY_ADDRESS={address}: {error}. "
                "Start it, or unset RAY_ADDRESS to run on this machine."
            ) from error
        return "cluster"
    ray.init(
        address="local",
        num_cpus=local_cpus(options),
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    return "local"


def _require_listener(address: str) -> None:
    """Raise OSError if nobody listens at ``HOST:PORT``: Ray would try for many minutes, without a word of ours."""
    host, separator, port = address.rpartition(":")
    if separator and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_LISTENER_S).close()


def local_cpus(options: PoolOptions) -> int:
    """Return the CPUs that a Ray of this machine must count for the whole pool; Ray counts whole ones."""
    # Rounded first, as 3 * 0.1 is more than 0.3 in binary fractions.
    return max(1, math.ceil(round(options.replicas * options.cpus_per_replica, 6)))


def _factory(plan: Plan, place: Place) -> Callable[[], Any]:
    from pipeline.replica import Replica

    return functools.partial(Replica, plan.config.model_dump(mode="json"), locate(place).address, plan.permissions)
