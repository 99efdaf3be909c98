"""Units a second through Ray with workers that do nothing: ``python -m benchmarks.pool_rate``.

Two replicas on two cores, windows of several depths, interleaved in one run; ping is a bare call to one actor in the
same run, for scale. Printed as JSON: the best and the median rate of every case, and the driver's processor time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
from typing import Any

from cluster import Event, PoolOptions, UnitDone, WorkUnit

UNITS_OF_A_SAMPLE = 100


class NoWork:
    """A worker that does nothing."""

    def run(self, payload: Any) -> int:
        """Return the payload."""
        return int(payload)


def rate(pool: Any, units: int) -> tuple[float, float]:
    """Run units and return how many a second, and the driver's milliseconds of processor time for each."""
    done = 0

    def count(event: Event) -> None:
        nonlocal done
        done += isinstance(event, UnitDone)

    began, busy = time.perf_counter(), time.process_time()
    finished = pool.run((WorkUnit(i, i // UNITS_OF_A_SAMPLE, i) for i in range(units)), count)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    assert finished, "the run was not stopped by anybody"
    assert done == units, done
    return units / seconds, 1000 * busy / units


def main() -> None:
    """Measure every depth in turn, several times over, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depths", default="2,8,32")
    args = parser.parse_args()
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    import ray

    from cluster.ray_pool import RayPool

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 * 2**20,
    )
    depths = [int(depth) for depth in args.depths.split(",")]
    found: dict[int, list[tuple[float, float]]] = {depth: [] for depth in depths}
    for _ in range(args.rounds):
        for depth in depths:
            pool = RayPool(NoWork, PoolOptions(replicas=2, in_flight=depth))
            rate(pool, 50 * depth)
            found[depth].append(rate(pool, args.units))
            pool.close()
    cases = {
        f"window_{depth}": {
            "units_a_second_best": round(max(rates)[0]),
            "units_a_second_median": round(statistics.median(r for r, _ in rates)),
            "driver_ms_a_unit": round(statistics.median(busy for _, busy in rates), 3),
        }
        for depth, rates in found.items()
    }
    print(json.dumps({"units": args.units, "rounds": args.rounds, **cases}, indent=2))
    ray.shutdown()


if __name__ == "__main__":
    main()
