"""Recompute random cells of a store with plain hooks: ``python -m tests.reference.recompute STORE --cells 50``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from pipeline.config import SweepConfig
from pipeline.models import load_pipeline
from pipeline.plan import Plan, make_plan
from pipeline.replica import Computer
from pipeline.store import Store, open_store
from tests.reference.hooks import Loop, recompute

TOLERANCE = 1e-4


def plan_of(store: Store) -> Plan:
    """Rebuild the plan of a store from its own attributes."""
    return make_plan(SweepConfig.model_validate(json.loads(str(store.root.attrs["config_json"]))))


def worst_differences(store: Store, cells: int, seed: int) -> list[tuple[str, str, float]]:
    """Recompute random cells; return (experiment, intervention, worst absolute metric difference) of each."""
    plan = plan_of(store)
    pipe = load_pipeline(plan.model, dtype="float32", device="cpu")
    rng = np.random.default_rng(seed)
    measure = Computer(plan, pipe)
    measure.engine.release()
    rows = []
    for _ in range(cells):
        # Every experiment is equally likely, else nearly all cells would come from the largest map.
        grid = plan.grids[int(rng.integers(len(plan.grids)))]
        sample = int(rng.integers(len(plan.samples)))
        name = grid.experiment.name
        exact = np.ones(grid.shape) if grid.experiment.screen is None else np.asarray(store.root[f"{name}/exact"][...])
        computed = np.argwhere(exact == 1)
        index = tuple(int(i) for i in computed[int(rng.integers(len(computed)))])
        cell = grid.intervention(index)
        inputs = plan.task.inputs(pipe, plan.samples[sample], plan.config.sampler)
        latents = recompute(pipe, inputs, plan.geometry, cell)
        loop = Loop(pipe, inputs, plan.geometry)
        clean, corrupted = loop.run(0)[0], loop.run(1)[0]
        reference = _Reference(torch.cat([clean, corrupted]), inputs.names)
        found = measure.measure(reference, latents, plan.samples[sample], [cell.recipient])  # type: ignore[arg-type]
        stored = {m: store.root[f"{name}/{m}"][(sample, *index)] for m in found}
        worst = max(float(np.abs(stored[m] - found[m][0]).max()) for m in found)
        rows.append((name, repr(cell), worst))
    return rows


class _Reference:
    """Stands in for a record: the two final latents."""

    def __init__(self, final: torch.Tensor, names: tuple[str, ...]) -> None:
        self.final, self.names = final, names

    def row(self, run: str) -> int:
        return self.names.index(run)


def main() -> int:
    """Print the tally; exit code 1 if a cell disagrees."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--cells", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = worst_differences(open_store(args.store), args.cells, args.seed)
    bad = [row for row in rows if not row[2] <= TOLERANCE]
    for name, cell, worst in sorted(rows, key=lambda r: -r[2])[:5]:
        print(f"{worst:.2e}  {name}  {cell}")
    print(f"{len(rows) - len(bad)} of {len(rows)} recomputed cells agree to {TOLERANCE:g}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
