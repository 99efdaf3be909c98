"""A driver of a thousand replicas: ``python -m benchmarks.wide_pool``.

The pool of a sweep, over Ray, with as many replicas as a large cluster has GPUs. As no machine here holds so many
processes, the replicas share a few Ray actors that only wait: what a driver asks and hears is the same, call for call,
and what it takes of a processor is measured. Printed as JSON, for two cases: units of ten seconds, whose answers come
one by one, and units of half a second, more than can be kept up with, whose answers come in heaps.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import local_ray
from benchmarks.figures import Bench
from cluster import Event, PoolOptions, UnitDone, WorkUnit
from cluster.pool import Pool
from cluster.work import Outcome

UNITS_OF_A_SAMPLE = 100
HOSTS = 2
CALLS_AT_ONCE = 10_000
HARDWARE = "none"
CASES = {"one_by_one": (10.0, 5), "in_heaps": (0.5, 12)}
"""Mean length of a unit in seconds, and units a replica."""


class Host:
    """Many replicas in one process: each does one unit after the other, and all of them only wait."""

    def __init__(self) -> None:
        self._locks: dict[int, asyncio.Lock] = {}

    async def place(self, seat: int) -> str:
        """Return the id of the node."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    async def start(self, seat: int) -> Any:
        """Return what a replica returns that has built its worker."""
        from cluster.ray_pool import _Started

        self._locks[seat] = asyncio.Lock()
        return _Started(hardware=HARDWARE)

    async def watch(self, seat: int) -> None:
        """Never return, as no node is told to go."""
        await asyncio.Event().wait()

    async def run(self, seat: int, payloads: Sequence[float]) -> list[Outcome]:
        """Wait as long as the units take."""
        outcomes = []
        for seconds in payloads:
            async with self._locks[seat]:
                await asyncio.sleep(seconds)
            outcomes.append(Outcome(seconds=seconds, receipt=seat))
        return outcomes


class _Call:
    """A method of one of the replicas of a host."""

    def __init__(self, method: Any, seat: int) -> None:
        self._method, self._seat = method, seat

    def remote(self, *args: Any) -> Any:
        return self._method.remote(self._seat, *args)


class _Seat:
    """What a backend holds of a replica: the handle of an actor, for one place in a host."""

    def __init__(self, host: Any, seat: int) -> None:
        for name in ("place", "start", "watch", "run"):
            setattr(self, name, _Call(getattr(host, name), seat))


def shared_backend(options: PoolOptions) -> Any:
    """Return the backend of a Ray pool whose replicas share processes."""
    import ray

    from cluster import ray_pool

    class SharedBackend(ray_pool.RayBackend):
        def __init__(self) -> None:
            super().__init__(Host, options)
            actor = ray.remote(max_concurrency=CALLS_AT_ONCE)(Host)
            self._hosts = [actor.options(num_cpus=0).remote() for _ in range(HOSTS)]

        def spawn(self, replica: int) -> None:
            seat = _Seat(self._hosts[replica % HOSTS], replica)
            self._actors[replica] = seat
            for kind in ("place", "start", "watch"):
                self._calls[getattr(seat, kind).remote()] = ray_pool._Call(kind, replica)

        def kill(self, replica: int, *, shun_node: bool = False) -> None:
            self._actors.pop(replica, None)
            self._calls = {ref: call for ref, call in self._calls.items() if call.replica != replica}

        def close(self) -> None:
            super().close()
            for host in self._hosts:
                ray.kill(host)

    return SharedBackend()


class Meter:
    """Processor time of this process from the moment when all replicas are at work until the last units."""

    def __init__(self, settle: int, stop: int) -> None:
        self._settle, self._stop = settle, stop
        self.done = 0
        self._from: tuple[float, float] = (0.0, 0.0)
        self._to: tuple[float, float] = (0.0, 0.0)

    def hear(self, event: Event) -> None:
        """Count a unit."""
        if not isinstance(event, UnitDone):
            return
        self.done += 1
        if self.done == self._settle:
            self._from = time.perf_counter(), time.process_time()
        if self.done == self._stop:
            self._to = time.perf_counter(), time.process_time()

    def figures(self) -> dict[str, float]:
        """Return units a second, and what they took."""
        seconds, busy = (to - since for to, since in zip(self._to, self._from, strict=True))
        units = self._stop - self._settle
        return {
            "units_a_second": round(units / seconds, 1),
            "driver_cores": round(busy / seconds, 3),
            "driver_ms_a_unit": round(1000 * busy / units, 3),
        }


def units_of(count: int, seconds: Callable[[], float]) -> Iterator[WorkUnit]:
    """Yield units, each with the time that it takes."""
    return (WorkUnit(i, i // UNITS_OF_A_SAMPLE, seconds()) for i in range(count))


def measure(replicas: int) -> dict[str, Any]:
    """Run both cases, one after the other, on one Ray."""
    import ray

    local_ray.start(HOSTS)
    cases = {name: _run(replicas, unit_s, rounds) for name, (unit_s, rounds) in CASES.items()}
    ray.shutdown()
    return {"replicas": replicas, **cases}


def _run(replicas: int, unit_s: float, rounds: int) -> dict[str, float]:
    options = PoolOptions(replicas=replicas, cpus_per_replica=0, start_timeout_s=300, straggler_factor=0)
    chance = random.Random(1)
    count = replicas * rounds
    # The first units of all replicas begin together; those after them are spread by their lengths.
    meter = Meter(settle=2 * replicas, stop=count - replicas)
    pool = Pool(shared_backend(options), options)
    finished = pool.run(units_of(count, lambda: unit_s * chance.uniform(0.5, 1.5)), meter.hear)
    pool.close()
    assert finished, "the run was not stopped by anybody"
    assert meter.done == count, meter.done
    return {"unit_s": unit_s, "units": count, **meter.figures()}


def main() -> int:
    """Run both cases and print what the driver took."""
    bench = Bench(__doc__)
    bench.parser.add_argument("--replicas", type=int, default=1000)
    args = bench.parser.parse_args()
    return bench.conclude(args, measure(args.replicas))


if __name__ == "__main__":
    sys.exit(main())
