"""What a sweep costs beside the bare denoiser: ``python -m benchmarks.engine_efficiency``.

A sweep of the demo's experiments on one sample of the embedded model, in this process: engine, solver, decoding,
metrics, Zarr store, journal. After every unit the same denoiser forwards are run bare, with as many rows each: no
nnsight, no pipeline, no solver, no store. Printed as JSON: seconds of both and their ratio. Loading the model and the
proof of its controls, once a replica, are told beside it and not in it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare import BareDenoiser
from benchmarks.figures import Bench, Target
from cluster import Event, UnitDone
from interventions.run import loop_order, replayed_loops
from interventions.sites import RUNS
from pipeline.config import load_config
from pipeline.layout import BASELINE, Unit
from pipeline.models import load_pipeline
from pipeline.plan import Plan, make_plan
from pipeline.sweep import run_sweep

CONFIG = Path(__file__).parents[1] / "configs" / "maze_demo.yaml"
TARGETS = (
    Target(
        what="seconds of the same forwards of the bare denoiser over those of the sweep",
        figure="engine_efficiency",
        bound="at least",
        limit=0.9,
    ),
)


def forwards(plan: Plan, unit: Unit) -> Counter[int]:
    """Return how often the denoiser is called with how many rows in a unit."""
    branches = len(plan.geometry.branches)
    if unit.group == BASELINE:
        return Counter({len(RUNS): plan.geometry.steps * branches})
    calls: Counter[int] = Counter()
    rows = plan.interventions(unit)
    for batch in plan.batches(rows):
        own = [rows[i] for i in batch]
        schedule = own[0].schedule
        loops = len(loop_order(schedule, plan.geometry.steps)) - replayed_loops(own, schedule, plan.geometry)
        calls[len(own)] += branches * loops
        calls[len(RUNS)] += (plan.batch_forwards(own) - branches * loops * len(own)) // len(RUNS)
    return calls


def bare_denoiser(plan: Plan) -> BareDenoiser:
    """Return the denoiser of a plan's model, in a pipeline of its own."""
    pipe = load_pipeline(plan.model, dtype="float32", device="cpu")
    return BareDenoiser(pipe, plan.task.inputs(pipe, plan.samples[0], plan.config.sampler))


def seconds_of(bare: BareDenoiser, calls: Counter[int]) -> float:
    """Time some calls of a denoiser, by their number of rows."""
    began = time.perf_counter()
    for rows, times in calls.items():
        bare.forwards(rows, times)
    return time.perf_counter() - began


class Meter:
    """Seconds of a sweep between one event and the next, and of the bare forwards that follow each unit."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._bare = plan, bare_denoiser(plan)
        self.sweep_s = self.bare_s = 0.0
        self.row_forwards = 0
        self.by_group: dict[str, list[float]] = {}
        self._since: float | None = None

    def __call__(self, event: Event, unit: Unit | None) -> None:
        """Take the time since the last event for the unit's, and run its forwards bare."""
        now = time.perf_counter()
        if isinstance(event, UnitDone) and unit is not None and self._since is not None:
            bare = seconds_of(self._bare, forwards(self._plan, unit))
            group = self.by_group.setdefault(unit.group, [0.0, 0.0])
            group[0] += now - self._since
            group[1] += bare
            self.row_forwards += self._plan.unit_forwards(unit)
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Let the time until the next event belong to no unit."""
        self._since = None

    @property
    def totals(self) -> tuple[float, float]:
        """Seconds of the sweep and of the bare denoiser."""
        return sum(g[0] for g in self.by_group.values()), sum(g[1] for g in self.by_group.values())


def measure(threads: int, *, steps: int, rounds: int) -> dict[str, Any]:
    """Run the sweep into a new store several times over, and the bare forwards between its units."""
    before = torch.get_num_threads()
    overrides = ["task.mazes=1", "task.pairs=[red/blue]", f"sampler.steps={steps}", f"engine.threads={threads}"]
    overrides += ["previews.samples=[]", "previews.patched={}", "unit_cells=54", "experiments.self_patch.step=[1]"]
    plan = make_plan(load_config(CONFIG, overrides))
    torch.set_num_threads(threads)
    meter = Meter(plan)
    try:
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                run_sweep(plan, Path(folder, "run.zarr"), observe=meter)
            meter.pause()
    finally:
        torch.set_num_threads(before)
    sweep, bare = meter.totals
    return {
        "threads": threads,
        "engine_efficiency": round(bare / sweep, 3),
        "seconds": {"sweep": round(sweep, 2), "bare": round(bare, 2)},
        "row_forwards": meter.row_forwards,
        "by_group": {name: round(b / s, 3) for name, (s, b) in meter.by_group.items()},
    }


def main() -> int:
    """Measure on one thread, as replicas run, and print the result."""
    bench = Bench(__doc__)
    bench.parser.add_argument("--steps", type=int, default=20)
    bench.parser.add_argument("--rounds", type=int, default=2)
    bench.parser.add_argument("--threads", type=int, default=1)
    args = bench.parser.parse_args()
    return bench.conclude(args, measure(args.threads, steps=args.steps, rounds=args.rounds), TARGETS)


if __name__ == "__main__":
    sys.exit(main())
