"""How much cheaper a cell is than with the loop a user would write: ``python -m benchmarks.naive_ratio``.

Both cases compute cells of a full patch map (steps x layers x components) on the embedded model, interleaved in one
process on the same threads, from the intervention to the metrics. The loop runs the whole diffusers pipeline once a
cell under nnsight, batch 1, with the prompt already encoded and the donor's activations already kept; stepscope
computes the same cells as units. Printed as JSON: seconds a cell of both, their ratio, and how far their values and
final latents lie apart. For one thread and for as many as there are cores, which is what such a loop would use.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import nnsight
import numpy as np
import torch
from torch import nn

from benchmarks.engine_efficiency import bare_denoiser, seconds_of
from benchmarks.figures import Bench, Target
from interventions.record import RunInputs
from pipeline.config import SweepConfig
from pipeline.layout import Unit
from pipeline.models import load_pipeline
from pipeline.plan import Plan, make_plan
from pipeline.replica import Computer

METRICS = ("goal_evidence", "solved", "trajectory")
TARGETS = (
    Target(
        what="seconds a cell of the obvious loop over those of stepscope, threads of all cores",
        figure="all_cores.naive_ratio",
        bound="at least",
        limit=8,
    ),
    Target(what="largest difference of a metric", figure="all_cores.largest_difference", bound="at most", limit=1e-5),
)


class _Whole(nn.Module):
    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.transformer = pipe.transformer
        object.__setattr__(self, "pipe", pipe)

    def forward(self, **kwargs: Any) -> torch.Tensor:
        return self.pipe(**kwargs, output_type="latent", return_dict=False)[0]


class NaiveLoop:
    """Save the donor's activations in one traced run, then write one of them in a whole run for every cell."""

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
        self.donor.update(found)

    def cell(self, step: int, layer: int, name: str) -> torch.Tensor:
        """Run the corrupted run whole with one site replaced; returns its final latents."""
        value = self.donor[step, layer, name]
        with self.model.trace(**self.inputs.shared, **self.inputs.rows([1])) as tracer:
            for _ in tracer.iter[step]:
                self.model.transformer.blocks[layer].get(name).output = value
            result = tracer.result.save()
        return result  # noqa: RET504 (bound inside the trace)


def plan_for(steps: int, layers: Sequence[int] | str = "all") -> Plan:
    """Return the plan of a patch map of one sample, one unit a step."""
    return make_plan(
        SweepConfig.model_validate(
            {
                "name": "bench",
                "model": {"id": "embedded:maze"},
                "task": {"name": "maze", "mazes": 1},
                "sampler": {"steps": steps},
                "metrics": METRICS,
                "experiments": {
                    "map": {"kind": "patch", "step": "all", "layer": layers, "component": ["attn1", "attn2", "ffn"]}
                },
                "unit_cells": 1,
            }
        )
    )


class Comparison:
    """Both ways to the same cells, on pipelines of their own."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.computer = Computer(plan, load_pipeline(plan.model, dtype="float32", device="cpu"))
        self.record = self.computer.record(0)
        self.naive = NaiveLoop(load_pipeline(plan.model, dtype="float32", device="cpu"), self.record.inputs)

    def step(self, unit: Unit, of_the_loop: int) -> dict[str, Any]:
        """Compute a unit, and some of its cells one by one; returns seconds, cells and the largest differences."""
        rows = self.plan.interventions(unit)
        chosen = list(range(0, len(rows), max(1, len(rows) // of_the_loop)))[:of_the_loop]
        sites = [(rows[i].step, rows[i].layer, rows[i].component) for i in chosen]  # type: ignore[attr-defined]
        self.naive.capture(set(sites), self.plan.geometry.steps)
        began = time.perf_counter()
        measured = [self._measured(self.naive.cell(*site)) for site in sites]
        loop_s = time.perf_counter() - began
        began = time.perf_counter()
        values = self.computer.cells(unit, np.ones(len(rows), dtype=np.bool_))
        ours_s = time.perf_counter() - began
        apart = [np.abs(values[m].ravel()[chosen] - [one[m] for one in measured]).max() for m in METRICS]
        return {"naive": (loop_s, len(sites)), "stepscope": (ours_s, len(rows)), "apart": float(max(apart))}

    def _measured(self, latents: torch.Tensor) -> dict[str, float]:
        found = self.computer.measure(self.record, latents, self.plan.samples[0])
        return {name: float(value[0]) for name, value in found.items()}


def measure(threads: int, *, steps: int, stride: int, naive_cells: int) -> dict[str, Any]:
    """Compute every ``stride``-th step of a map both ways, step by step in turn.

    Parameters
    ----------
    naive_cells : cells of each step that the loop runs; all of them would take a quarter of an hour.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plan = plan_for(steps)
        both = Comparison(plan)
        units = [unit for unit in plan.units() if unit.group == "map"]
        both.step(units[-1], 1)
        bare, ms = bare_denoiser(plan), {1: 0.0, plan.rows: 0.0}
        told = []
        for unit in units[stride // 2 :: stride]:
            told.append(both.step(unit, naive_cells))
            for rows in ms:
                ms[rows] += 1000 * seconds_of(bare, Counter({rows: 4})) / (4 * rows)
    finally:
        torch.set_num_threads(before)
    seconds = {
        way: sum(one[way][0] for one in told) / sum(one[way][1] for one in told) for way in ("naive", "stepscope")
    }
    return {
        "threads": threads,
        "steps": steps,
        "seconds_a_cell": {way: round(value, 5) for way, value in seconds.items()},
        "naive_ratio": round(seconds["naive"] / seconds["stepscope"], 2),
        "bare_ms_a_row": {str(rows): round(total / len(told), 2) for rows, total in ms.items()},
        "largest_difference": float(f"{max(one['apart'] for one in told):.2e}"),
        "cells": {way: sum(one[way][1] for one in told) for way in seconds},
    }


def main() -> int:
    """Measure on one thread and on all cores, and print the result."""
    bench = Bench(__doc__)
    bench.parser.add_argument("--steps", type=int, default=20)
    bench.parser.add_argument("--stride", type=int, default=3)
    bench.parser.add_argument("--naive-cells", type=int, default=6, help="cells of each step that the loop runs")
    args = bench.parser.parse_args()
    settings = {"steps": args.steps, "stride": args.stride, "naive_cells": args.naive_cells}
    figures = {
        "all_cores": measure(os.cpu_count() or 1, **settings),
        "one_thread": measure(1, **settings),
    }
    return bench.conclude(args, figures, TARGETS)


if __name__ == "__main__":
    sys.exit(main())
