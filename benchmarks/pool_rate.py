"""Units a second through Ray with workers that do nothing: ``python -m benchmarks.pool_rate``.

Two replicas on two cores, windows of several depths, interleaved in one run. Printed as JSON: the best and the median
rate of every depth, and the driver's processor time a unit. Sweeps run with the depth that ``PoolOptions`` has.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from benchmarks import local_ray
from benchmarks.figures import Bench, Target
from cluster import Event, PoolOptions, UnitDone, WorkUnit

UNITS_OF_A_SAMPLE = 100
TARGETS = (
    Target(
        what=f"units a second through Ray, {PoolOptions().in_flight} in the window of a replica, median of the rounds",
        figure=f"window_{PoolOptions().in_flight}.units_a_second_median",
        bound="at least",
        limit=1000,
    ),
)


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


def main() -> int:
    """Measure every depth in turn, several times over, and print the result."""
    bench = Bench(__doc__)
    bench.parser.add_argument("--units", type=int, default=5000)
    bench.parser.add_argument("--rounds", type=int, default=5)
    bench.parser.add_argument("--depths", default="2,8,32")
    args = bench.parser.parse_args()
    depths = [int(depth) for depth in args.depths.split(",")]
    return bench.conclude(args, measure(args.units, args.rounds, depths), TARGETS)


def measure(units: int, rounds: int, depths: list[int]) -> dict[str, Any]:
    """Run units through windows of each depth, round by round."""
    import ray

    from cluster.ray_pool import RayPool

    local_ray.start(2)
    found: dict[int, list[tuple[float, float]]] = {depth: [] for depth in depths}
    for _ in range(rounds):
        for depth in depths:
            pool = RayPool(NoWork, PoolOptions(replicas=2, in_flight=depth))
            rate(pool, 50 * depth)
            found[depth].append(rate(pool, units))
            pool.close()
    ray.shutdown()
    cases = {
        f"window_{depth}": {
            "units_a_second_best": round(max(rates)[0]),
            "units_a_second_median": round(statistics.median(r for r, _ in rates)),
            "driver_ms_a_unit": round(statistics.median(busy for _, busy in rates), 3),
        }
        for depth, rates in found.items()
    }
    return {"units": units, "rounds": rounds, **cases}


if __name__ == "__main__":
    sys.exit(main())
