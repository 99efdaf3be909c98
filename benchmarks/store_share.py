"""What a replica's time goes into besides the model: ``python -m benchmarks.store_share``, ``--quick`` for fewer steps.

A real replica computes the units of the demo sweep on the embedded model, into a store in a folder. Timed are the whole
of each unit, the writes of its regions, and the metrics with the decoding that they need. Units of the demo as it is
and with the field metrics added alternate, sample by sample, in one process on the threads that the config gives a
replica; the first sample is left out, as it warms up. Shares are of the time in units, without the driver's, which
waits.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.figures import Bench, Target
from pipeline.config import SweepConfig, load_config
from pipeline.plan import Plan, make_plan
from pipeline.store import open_or_create

DEMO = Path(__file__).parents[1] / "configs" / "maze_demo.yaml"
FIELDS = ("frame_change", "change_map")
FEWEST_STEPS = 11
WRITES = ("write_cells", "write_sample")
TARGETS = (
    Target(what="store: share of a replica's time, demo", figure="demo.write_share", bound="at most", limit=0.03),
    Target(
        what="store: share of a replica's time, demo with fields",
        figure="demo_with_fields.write_share",
        bound="at most",
        limit=0.03,
    ),
)


class Clock:
    """Seconds by what they went into."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose seconds are added up under a name."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[what] += time.perf_counter() - began

        return call


class Case:
    """One config with a replica of it and a store."""

    def __init__(self, config: SweepConfig, folder: Path) -> None:
        from pipeline.replica import Replica

        self.plan: Plan = make_plan(config)
        store = open_or_create(folder / f"{config.name}.zarr", self.plan)
        self.replica = Replica(config.model_dump(mode="json"), store.location.address)
        self.clock, self.cells, self.units, self.bytes = Clock(), 0, 0, 0
        writer: Any = self.replica.store
        for name in WRITES:
            setattr(writer, name, self.clock.timed("write", getattr(writer, name)))
        computer: Any = self.replica.computer
        computer.measure = self.clock.timed("measure", computer.measure)

    def run(self, sample: int) -> None:
        """Run the units of a sample and add up what they took."""
        for unit in (unit for unit in self.plan.units() if unit.sample == sample):
            receipt = self.clock.timed("unit", self.replica.run)(unit)
            self.cells += receipt.cells
            self.units += 1
            self.bytes += receipt.bytes

    def figures(self) -> dict[str, Any]:
        """Return the shares."""
        seconds = self.clock.seconds
        return {
            "units": self.units,
            "cells": self.cells,
            "bytes_a_cell": round(self.bytes / self.cells),
            "seconds": round(seconds["unit"], 2),
            "write_ms_a_unit": round(1000 * seconds["write"] / self.units, 2),
            "write_share": round(seconds["write"] / seconds["unit"], 5),
            "measure_share": round(seconds["measure"] / seconds["unit"], 5),
        }


def config_of(name: str, metrics: tuple[str, ...], samples: int, steps: int) -> SweepConfig:
    """Return the demo config with more metrics, of a few samples."""
    demo = load_config(DEMO)
    raw = demo.model_dump(mode="json")
    raw |= {"name": name, "metrics": [*raw["metrics"], *metrics], "previews": {"samples": []}}
    raw["task"] = {**raw["task"], "mazes": -(-samples // len(raw["task"]["pairs"]))}
    raw["sampler"] = {**raw["sampler"], "steps": steps}
    return SweepConfig.model_validate(raw)


def measure(samples: int = 3, steps: int = 20) -> dict[str, Any]:
    """Run so many samples of each case in turn and return the shares of all but the first."""
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "demo": Case(config_of("demo", (), samples + 1, steps), Path(folder)),
            "demo_with_fields": Case(config_of("fields", FIELDS, samples + 1, steps), Path(folder)),
        }
        for sample in range(samples + 1):
            for case in cases.values():
                case.run(sample)
                if sample == 0:
                    case.clock.seconds.clear()
                    case.cells = case.units = case.bytes = 0
        return {name: case.figures() for name, case in cases.items()}


def main() -> int:
    """Measure and print."""
    bench = Bench(__doc__)
    bench.parser.add_argument("--quick", action="store_true", help="one sample, the fewest steps that the demo allows")
    bench.parser.add_argument("--samples", type=int, default=3, help="measured samples")
    args = bench.parser.parse_args()
    return bench.conclude(args, measure(1, FEWEST_STEPS) if args.quick else measure(args.samples), TARGETS)


if __name__ == "__main__":
    sys.exit(main())
