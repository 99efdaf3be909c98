"""How much cheaper a cell is than with the loop a user would write: ``python -m benchmarks.naive_ratio``.

Both cases compute the same patch cells on the embedded model, interleaved in one process on one thread: the naive one
runs the whole diffusers pipeline once a cell under nnsight, batch 1; stepscope's forks rows with prefix replay. Printed
as JSON: seconds per cell of both, their ratio, and the largest difference of the final latents.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import nnsight
import numpy as np
import torch
from torch import nn

from interventions.base import KINDS, Intervention
from interventions.record import RunInputs
from pipeline.config import SweepConfig
from pipeline.models import load_pipeline
from pipeline.plan import make_plan
from pipeline.replica import Computer


class _Whole(nn.Module):
    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.transformer = pipe.transformer
        object.__setattr__(self, "pipe", pipe)

    def forward(self, **kwargs: Any) -> torch.Tensor:
        return self.pipe(**kwargs, output_type="latent", return_dict=False)[0]


class NaiveLoop:
    """Save the donor's activation in one traced run, write it in a second one: two whole runs, the first one cached."""

    def __init__(self, pipe: Any, inputs: RunInputs) -> None:
        self.model, self.inputs = nnsight.NNsight(_Whole(pipe)), inputs
        self.donor: dict[tuple[int, int, str], torch.Tensor] = {}

    def capture(self, sites: set[tuple[int, int, str]], steps: int) -> None:
        """Keep the clean run's activations at every site, as such a loop would."""
        with self.model.trace(**self.inputs.shared, **self.inputs.rows([0])) as tracer:
            found = nnsight.save({})
            for step in tracer.iter[:steps]:
                for _, layer, name in sorted(s for s in sites if s[0] == step):
                    found[step, layer, name] = self.model.transformer.blocks[layer].get(name).output.clone()
        self.donor = dict(found)

    def cell(self, step: int, layer: int, name: str) -> torch.Tensor:
        """Run the corrupted run whole with one site replaced."""
        value = self.donor[step, layer, name]
        with self.model.trace(**self.inputs.shared, **self.inputs.rows([1])) as tracer:
            for _ in tracer.iter[step]:
                self.model.transformer.blocks[layer].get(name).output = value
            result = tracer.result.save()
        return result  # noqa: RET504 (bound inside the trace)


def plan_for(steps: int) -> Any:
    """Return the plan of a full patch map on one sample."""
    return make_plan(
        SweepConfig.model_validate(
            {
                "name": "bench",
                "model": {"id": "embedded:maze"},
                "task": {"name": "maze", "mazes": 1},
                "sampler": {"steps": steps},
                "metrics": ["goal_evidence"],
                "experiments": {
                    "map": {"kind": "patch", "step": "all", "layer": "all", "component": ["attn1", "attn2", "ffn"]}
                },
            }
        )
    )


def main() -> None:
    """Time both cases on every ``stride``-th step of a map and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stride", type=int, default=5)
    parser.add_argument("--naive-cells", type=int, default=6, help="cells of each step that the naive loop runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = plan_for(args.steps)
    pipe = load_pipeline(plan.model, dtype="float32", device="cpu")
    naive_pipe = load_pipeline(plan.model, dtype="float32", device="cpu")
    computer = Computer(plan, pipe)
    record = computer.record(0)
    naive = NaiveLoop(naive_pipe, record.inputs)
    grid = plan.grids[0]
    seconds = {"naive": 0.0, "stepscope": 0.0}
    cells = {"naive": 0, "stepscope": 0}
    worst = 0.0
    for step in range(args.stride // 2, args.steps, args.stride):
        rows: list[Intervention] = [
            KINDS["patch"](step=step, layer=v.layer, component=v.component) for v in _at(grid, step)
        ]
        chosen = rows[:: max(1, len(rows) // args.naive_cells)][: args.naive_cells]
        naive.capture({(step, r.layer, r.component) for r in chosen}, args.steps)  # type: ignore[attr-defined]
        started = time.perf_counter()
        singles = [naive.cell(step, r.layer, r.component) for r in chosen]  # type: ignore[attr-defined]
        seconds["naive"] += time.perf_counter() - started
        cells["naive"] += len(chosen)
        started = time.perf_counter()
        final = computer.engine.fork(record, rows).final
        seconds["stepscope"] += time.perf_counter() - started
        cells["stepscope"] += len(rows)
        batched = final[[rows.index(r) for r in chosen]]
        worst = max(worst, float((torch.cat(singles) - batched).abs().max()))
    per_cell = {name: seconds[name] / cells[name] for name in seconds}
    result = {
        "seconds_per_cell": {k: round(v, 5) for k, v in per_cell.items()},
        "naive_ratio": round(per_cell["naive"] / per_cell["stepscope"], 2),
        "largest_latent_difference": float(np.format_float_scientific(worst, 2)),
        "cells": cells,
    }
    print(json.dumps(result, indent=2))


def _at(grid: Any, step: int) -> list[Any]:
    return list(grid.interventions(range(step, step + 1)))


if __name__ == "__main__":
    main()
