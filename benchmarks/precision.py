"""How many runs a precision saves on the demo sweep: ``python -m benchmarks.precision [--quick] [--store PATH]``.

The experiments of the demo config are computed once for every problem, and the stopping rule is replayed on the stored
values: which cells stop is a function of them alone, so this counts what a sweep with ``precision`` would compute.
Compared are two designs whose widest interval, over the cells that matter, is the same:

- *fixed*: every cell for the same number of problems, the smallest at which the ordinary t interval (level 0.95) of
  every cell that matters is narrow enough;
- *rounds*: ``precision``, whose intervals hold at every look and so are wider for as many problems.

Cells that matter are those whose interval over all problems excludes 0, in some pair kind or over all of them. The
half-width is the widest that such a cell has after all problems with the intervals of the rounds, so the rounds reach
it for all of them, for the widest at the very end. Printed as JSON: runs (cells, and the two recorded runs of every
sample) and row-forwards of both designs, and their ratios.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from benchmarks.figures import Bench, Target
from pipeline.config import SweepConfig
from pipeline.executors import inline_executor, ray_executor
from pipeline.looks import spread_level
from pipeline.plan import Plan, make_plan
from pipeline.precision import Bounds, Key, mean_bounds, prompt_means
from pipeline.rounds import decide, differences
from pipeline.store import Place, Store
from pipeline.sweep import run_sweep

DEMO = Path(__file__).parents[1] / "configs" / "maze_demo.yaml"
METRIC = "goal_evidence"
LEVEL = 0.95
TARGETS = (
    Target(
        what="runs of a fixed design over those in rounds, at equal worst half-width of the cells that matter",
        figure="runs.ratio",
        bound="at least",
        limit=3,
    ),
)
Maps = dict[str, NDArray[Any]]


def plan_for(
    mazes: int, steps: int, precision: dict[str, Any] | None = None, replicas: int = 0, **changes: Any
) -> Plan:
    """Return the plan of the demo sweep with other numbers of mazes and steps, and one metric."""
    raw = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    raw["task"]["mazes"], raw["sampler"]["steps"], raw["metrics"] = mazes, steps, [METRIC]
    raw["previews"], raw["run"] = {"samples": []}, {"replicas": replicas}
    raw["experiments"]["self_patch"]["step"] = [steps // 2]
    raw |= changes
    for entry in raw["experiments"].values():
        if precision is not None:
            entry["precision"] = precision
    return make_plan(SweepConfig.model_validate(raw))


def compute(plan: Plan, place: Place) -> Store:
    """Run a sweep, or the rest of it."""
    executor = ray_executor if plan.config.run.replicas else inline_executor
    result = run_sweep(plan, place, make_executor=executor)
    if result.failed or result.interrupted:
        raise RuntimeError(f"the sweep did not finish: {result.errors or result.stopped}. Run it again.")
    return Store(place)


def replay(plan: Plan, store: Store) -> Maps:
    """Return for how many rounds each cell is computed, from a store of the same sweep without precision."""
    found: Maps = {}
    for name, rounds in plan.rounds.items():
        stopped = np.zeros(plan.by_name[name].shape, dtype=np.bool_)
        found[name] = np.ones(stopped.shape, dtype=np.int64)
        for look in range(rounds.looks - 1):
            stopped = decide(plan, store, name, look, stopped)
            found[name] += ~stopped
    return found


class Effects:
    """Differences of every experiment of a full store, and their intervals over its first problems."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.keys: list[Key] = [(sample.pair, sample.prompt) for sample in plan.samples]
        self.pairs = [None, *dict.fromkeys(pair for pair, _ in self.keys)]
        self.values = {name: differences(plan, store, name, METRIC) for name in plan.by_name}

    def bounds(self, name: str, samples: int, level: float) -> list[Bounds]:
        """Return the intervals of all cells, in each pair kind and over all of them."""
        found = []
        for pair in self.pairs:
            rows = [i for i, key in enumerate(self.keys[:samples]) if pair in (None, key[0])]
            means = prompt_means(self.values[name][rows], [self.keys[i][1] for i in rows])
            found.append(mean_bounds(means, level=level))
        return found

    def matters(self) -> Maps:
        """Return which cells have an interval, over all problems, that excludes 0."""
        every = {name: self.bounds(name, len(self.keys), LEVEL) for name in self.values}
        return {name: np.any([(b.low > 0) | (b.high < 0) for b in bounds], axis=0) for name, bounds in every.items()}

    def widest(self, samples: int, level: float, matters: Maps) -> float:
        """Return the widest half-width of the cells that matter."""
        widths = [np.max([b.half_width for b in self.bounds(n, samples, level)], axis=0)[m] for n, m in matters.items()]
        return float(np.max(np.concatenate(widths), initial=0.0))


def measure(plan: Plan, store: Store, *, first: int = 8, growth: float = 1.5) -> dict[str, Any]:
    """Compare the two designs on a full store.

    Raises
    ------
    ValueError : no cell matters.
    """
    effects = Effects(plan, store)
    matters, per_problem = effects.matters(), len(plan.samples) // len(plan.problems)
    if not any(m.any() for m in matters.values()):
        raise ValueError("no interval excludes 0, so no cell matters. Compute more problems.")
    at_look = spread_level(LEVEL, next(iter(_in_rounds(plan, 1.0, first, growth).rounds.values())).prompts)
    half_width = effects.widest(len(plan.samples), at_look, matters)
    in_rounds = _in_rounds(plan, half_width, first, growth)
    rounds = next(iter(in_rounds.rounds.values()))
    used = replay(in_rounds, store)
    fixed = next(
        n for n in range(2, len(plan.problems) + 1) if effects.widest(n * per_problem, LEVEL, matters) <= half_width
    )
    cells, samples = sum(grid.cells for grid in plan.grids), len(plan.samples)
    ends = np.array(rounds.samples)
    computed = int(sum(ends[n - 1].sum() for n in used.values()))
    runs = {"fixed": fixed * per_problem * (cells + 2), "rounds": computed + 2 * samples}
    forwards = {
        "fixed": fixed * per_problem * _forwards(plan, {n: np.ones(g.shape, bool) for n, g in plan.by_name.items()}),
        "rounds": sum(
            (stop - start) * _forwards(plan, {n: u > r for n, u in used.items()})
            for r, (start, stop) in enumerate(zip((0, *rounds.samples), rounds.samples, strict=False))
        ),
    }
    important = np.concatenate([ends[used[name].ravel() - 1][m] for name, m in matters.items()]) // per_problem
    counts = Counter(int(ends[n - 1]) // per_problem for grid in used.values() for n in grid.ravel())
    return {
        "metric": METRIC,
        "problems": len(plan.problems),
        "samples": samples,
        "steps": plan.geometry.steps,
        "cells_of_a_sample": cells,
        "cells_that_matter": int(sum(m.sum() for m in matters.values())),
        "half_width": round(half_width, 5),
        "looks": list(rounds.problems),
        "level_at_look": at_look,
        "problems_fixed": fixed,
        "problems_in_rounds": {
            "mean": round(computed / cells / per_problem, 2),
            "mean_of_cells_that_matter": round(float(important.mean()), 2),
            "cells": {str(n): counts[n] for n in sorted(counts)},
        },
        "runs": {**runs, "ratio": round(runs["fixed"] / runs["rounds"], 2)},
        "row_forwards": {**forwards, "ratio": round(forwards["fixed"] / forwards["rounds"], 2)},
    }


def _in_rounds(plan: Plan, half_width: float, first: int, growth: float) -> Plan:
    """Return the plan of the same sweep with a precision for every experiment."""
    settings = {"half_width": half_width, "metric": METRIC, "level": LEVEL, "first": first, "growth": growth}
    experiments = {name: {**raw, "precision": settings} for name, raw in plan.config.experiments.items()}
    return make_plan(plan.config.model_copy(update={"experiments": experiments}))


def _forwards(plan: Plan, computed: Maps) -> int:
    """Return the row-forwards of one sample of which only some cells are computed, batched as units are."""
    total = 2 * plan.geometry.steps * len(plan.geometry.branches)
    for name, grid in plan.by_name.items():
        windows = plan.layout.windows(name)
        for start, stop in map(windows.bounds, range(windows.count)):
            chosen = (computed[name][start:stop] if grid.shape else computed[name]).ravel()
            rows = [row for row, kept in zip(grid.interventions(range(start, stop)), chosen, strict=True) if kept]
            total += sum(plan.batch_forwards([rows[i] for i in batch]) for batch in plan.batches(rows))
    return total


def main() -> int:
    """Compute the sweep, compare, and print the result."""
    bench = Bench(__doc__)
    bench.parser.add_argument("--mazes", type=int, default=48)
    bench.parser.add_argument("--steps", type=int, default=6)
    bench.parser.add_argument("--replicas", type=int, default=2, help="0 runs in this process, without Ray")
    bench.parser.add_argument("--store", help="keeps the sweep, and goes on with one that is there")
    bench.parser.add_argument("--quick", action="store_true", help="12 mazes, 4 steps")
    args = bench.parser.parse_args()
    torch.set_num_threads(1)
    mazes, steps = (12, 4) if args.quick else (args.mazes, args.steps)
    plan = plan_for(mazes, steps, replicas=args.replicas)
    with tempfile.TemporaryDirectory() as folder:
        store = compute(plan, args.store or Path(folder) / "run.zarr")
        figures = measure(plan, store, first=6 if args.quick else 8)
    return bench.conclude(args, figures, TARGETS)


if __name__ == "__main__":
    sys.exit(main())
