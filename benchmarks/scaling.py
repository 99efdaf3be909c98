"""What more replicas give: ``python -m benchmarks.scaling``.

Units of the embedded model by one and by two replicas through Ray, one thread each; and units of a denoiser that is
only waited for, by one and by eight. Both cases of a pair take turns in one run. A rate is counted from the moment
when every replica has its worker until the last unit is done. Printed as JSON: rates and their ratios.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import local_ray
from benchmarks.figures import Bench, Target
from cluster import Event, PoolOptions, ReplicaStarted, UnitDone, WorkUnit
from pipeline.config import SweepConfig
from pipeline.executors import ray_executor
from pipeline.layout import Unit
from pipeline.plan import Plan, make_plan
from pipeline.sweep import run_sweep

SIMULATED = 8
TARGETS = (
    Target(
        what="rate of two replicas over one, two cores", figure="two_replicas.speedup", bound="at least", limit=1.85
    ),
    Target(
        what=f"rate of {SIMULATED} replicas over one, simulated denoiser",
        figure="eight_simulated.speedup",
        bound="at least",
        limit=7.6,
    ),
)


class Rate:
    """Work a second, from when a number of replicas have started to the last unit done."""

    def __init__(self, replicas: int, weigh: Callable[[int], float]) -> None:
        self._missing, self._weigh = replicas, weigh
        self._since: float | None = None
        self._until, self._work = 0.0, 0.0

    def hear(self, event: Event) -> None:
        """Count a unit that was done with every replica there."""
        now = time.perf_counter()
        if isinstance(event, ReplicaStarted):
            self._missing -= 1
        elif isinstance(event, UnitDone) and self._missing <= 0:
            if self._since is None:
                # Units that the first replicas had begun before lie partly outside.
                self._since = now
                return
            self._until, self._work = now, self._work + self._weigh(event.unit)

    @property
    def value(self) -> float:
        """Work a second.

        Raises
        ------
        ValueError : fewer than two units were done since all replicas had started.
        """
        if self._since is None or not self._work:
            raise ValueError("too few units were done with all replicas there. Give it more units.")
        return self._work / (self._until - self._since)


class Waiting:
    """A worker whose denoiser takes a time and no processor."""

    def run(self, payload: float) -> float:
        """Wait so many seconds."""
        time.sleep(payload)
        return payload


def sweep_plan(replicas: int, samples: int, steps: int) -> Plan:
    """Return the plan of a patch map, one unit a step."""
    return make_plan(
        SweepConfig.model_validate(
            {
                "name": "scaling",
                "model": {"id": "embedded:maze"},
                "task": {"name": "maze", "mazes": samples},
                "sampler": {"steps": steps},
                "metrics": ["goal_evidence", "solved", "trajectory"],
                "experiments": {
                    "map": {"kind": "patch", "step": "all", "layer": "all", "component": ["attn1", "attn2", "ffn"]}
                },
                "previews": {"samples": []},
                "unit_cells": 18,
                "run": {"replicas": replicas, "straggler_factor": 0},
            }
        )
    )


def sweep_rate(replicas: int, samples: int, steps: int) -> float:
    """Run a sweep into a store of its own and return row-forwards a second."""
    plan = sweep_plan(replicas, samples, steps)
    rate = Rate(replicas, lambda number: plan.unit_forwards(plan.layout.unit(number)))

    def observe(event: Event, unit: Unit | None) -> None:
        rate.hear(event)

    with tempfile.TemporaryDirectory() as folder:
        run_sweep(plan, Path(folder, "run.zarr"), make_executor=ray_executor, observe=observe)
    return rate.value


def simulated_rate(replicas: int, units_of_each: int, seconds: float) -> float:
    """Run units that only wait and return units a second."""
    from cluster.ray_pool import RayPool

    rate = Rate(replicas, lambda number: 1.0)
    pool = RayPool(Waiting, PoolOptions(replicas=replicas, cpus_per_replica=0.2, straggler_factor=0))
    # Lengths differ by unit as those of real ones do, in a fixed order.
    lengths = [seconds * (0.8 + 0.05 * (i * 5 % 9)) for i in range(replicas * units_of_each)]
    try:
        pool.run((WorkUnit(i, i // 20, length) for i, length in enumerate(lengths)), rate.hear)
    finally:
        pool.close()
    return rate.value


def compare(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Run two cases in turn and return the median of their rates and what the second is of the first."""
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            rates[name].append(case())
    few, many = (statistics.median(found) for found in rates.values())
    return {
        "rates": {name: [round(rate, 2) for rate in found] for name, found in rates.items()},
        "speedup": round(many / few, 2),
    }


def measure(*, rounds: int, samples: int, steps: int, units_of_each: int, seconds: float) -> dict[str, Any]:
    """Measure both pairs on one Ray of two cores."""
    import ray

    local_ray.start(2)
    try:
        return {
            "two_replicas": compare(
                {"one": lambda: sweep_rate(1, samples, steps), "two": lambda: sweep_rate(2, 2 * samples, steps)}, rounds
            ),
            "eight_simulated": compare(
                {
                    "one": lambda: simulated_rate(1, units_of_each, seconds),
                    "eight": lambda: simulated_rate(SIMULATED, units_of_each, seconds),
                },
                rounds,
            ),
        }
    finally:
        ray.shutdown()


def main() -> int:
    """Measure and print."""
    bench = Bench(__doc__)
    bench.parser.add_argument("--rounds", type=int, default=3)
    bench.parser.add_argument("--samples", type=int, default=2, help="of each replica")
    bench.parser.add_argument("--steps", type=int, default=20)
    bench.parser.add_argument("--units", type=int, default=60, help="of each simulated replica")
    bench.parser.add_argument("--seconds", type=float, default=0.25, help="of a simulated unit")
    args = bench.parser.parse_args()
    figures = measure(
        rounds=args.rounds,
        samples=args.samples,
        steps=args.steps,
        units_of_each=args.units,
        seconds=args.seconds,
    )
    return bench.conclude(args, figures, TARGETS)


if __name__ == "__main__":
    sys.exit(main())
