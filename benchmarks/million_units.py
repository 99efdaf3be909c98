"""Memory of a driver over a very large sweep: ``python -m benchmarks.million_units``.

A sweep of a million units is planned, its store created, and every unit driven through the in-process pool by a worker
that does nothing: what is left is what the driver needs. Printed as JSON: resident memory at the start (libraries
loaded, nothing planned), its highest value afterwards, units a second, processor time and bytes of the journal a unit.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures import Bench, Target
from cluster import Event, InlinePool, UnitDone
from pipeline.config import SweepConfig
from pipeline.plan import make_plan
from pipeline.replica import Receipt
from pipeline.store import open_or_create
from pipeline.sweep import run_sweep

WINDOWS = 99
SAMPLED_EVERY = 2_000
MIB = 2**20
TARGETS = (
    Target(what="memory of the driver above its start, MiB", figure="mib_above_start", bound="at most", limit=300),
    Target(what="units", figure="units", bound="at least", limit=1_000_000),
)


class NoWork:
    """A worker that returns a receipt and computes nothing."""

    def run(self, payload: Any) -> Receipt:
        """Return the receipt of a unit of one cell."""
        return Receipt(cells=1, failed=0, bytes=4, row_forwards=1, seconds=0.0)


def config_of(units: int) -> SweepConfig:
    """Return a sweep of about as many units: one cell each, ``WINDOWS`` of them and a baseline a sample."""
    samples = max(1, units // (WINDOWS + 1))
    return SweepConfig.model_validate(
        {
            "name": "million",
            "model": {"id": "embedded:maze"},
            "task": {"name": "maze", "mazes": samples},
            "sampler": {"steps": WINDOWS},
            "metrics": ["latent_distance"],
            "experiments": {"map": {"kind": "noise", "at": "step", "step": "all"}},
            "previews": {"samples": []},
            "unit_cells": 1,
        }
    )


def main() -> int:
    """Drive the sweep and print what it took."""
    bench = Bench(__doc__)
    bench.parser.add_argument("--units", type=int, default=1_000_000)
    args = bench.parser.parse_args()
    return bench.conclude(args, measure(args.units), TARGETS)


def measure(units: int) -> dict[str, Any]:
    """Drive a sweep of so many units and return what it took."""
    process = psutil.Process()
    # Loads what planning loads, so that libraries do not count as memory of the sweep.
    small = make_plan(config_of(WINDOWS))
    highest = {"bytes": 0, "units": 0}

    def observe(event: Event, unit: Any) -> None:
        highest["units"] += isinstance(event, UnitDone)
        if highest["units"] % SAMPLED_EVERY == 0:
            highest["bytes"] = max(highest["bytes"], process.memory_info().rss)

    with tempfile.TemporaryDirectory() as folder:
        open_or_create(Path(folder) / "small.zarr", small)
        start = process.memory_info().rss
        began = time.perf_counter()
        plan = make_plan(config_of(units))
        planned = time.perf_counter()
        store = Path(folder) / "run.zarr"
        open_or_create(store, plan)
        created, busy = time.perf_counter(), time.process_time()
        result = run_sweep(plan, store, make_executor=lambda plan, place: InlinePool(NoWork), observe=observe)
        driven, busy = time.perf_counter(), time.process_time() - busy
        again = run_sweep(plan, store, make_executor=lambda plan, place: InlinePool(NoWork), observe=observe)
        resumed = time.perf_counter()
        highest["bytes"] = max(highest["bytes"], process.memory_info().rss)
        journal = (store / "journal.jsonl").stat().st_size
    assert result.done == len(plan.layout), result
    assert again.computed == 0, again
    return {
        "units": len(plan.layout),
        "mib_at_start": round(start / MIB),
        "mib_above_start": round((highest["bytes"] - start) / MIB),
        "seconds_to_plan": round(planned - began, 1),
        "seconds_to_create": round(created - planned, 1),
        "units_a_second": round(len(plan.layout) / (driven - created)),
        "driver_ms_a_unit": round(1000 * busy / len(plan.layout), 3),
        "seconds_to_see_that_nothing_is_left": round(resumed - driven, 1),
        "journal_bytes_a_unit": round(journal / len(plan.layout)),
    }


if __name__ == "__main__":
    sys.exit(main())
