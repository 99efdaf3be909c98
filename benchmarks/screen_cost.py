"""What screening a step costs, and how well it ranks cells: ``python -m benchmarks.screen_cost``.

Both cases compute the same step of the embedded model, interleaved in one process on one thread: a plain forward of the
two recorded runs (one site read), and the screening of every patch of the step. The patches are then computed exactly.
Printed as JSON: seconds of both, their ratio, and the agreement of estimates with what the patches do to the same
objective at their own step and to final metrics, all averaged over samples: Spearman correlation, and the share of the
strongest tenth that ranks in the estimates' strongest tenth.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from interventions.screen import screen
from interventions.sites import RUNS, Site
from pipeline.config import SweepConfig
from pipeline.metrics.objective import OBJECTIVES
from pipeline.models import load_pipeline
from pipeline.plan import make_plan
from pipeline.replica import Computer
from pipeline.screening import share_of_step

OBJECTIVE = "clean_projection"
FINAL = ("clean_projection", "goal_evidence")
Floats = NDArray[np.float64]


def plan_for(steps: int, stride: int, mazes: int, components: list[str]) -> Any:
    """Return the plan of a patch map."""
    return make_plan(
        SweepConfig.model_validate(
            {
                "name": "bench",
                "model": {"id": "embedded:maze"},
                "task": {"name": "maze", "mazes": mazes},
                "sampler": {"steps": steps},
                "metrics": list(FINAL),
                "experiments": {
                    "map": {"kind": "patch", "step": f"::{stride}", "layer": "all", "component": components}
                },
            }
        )
    )


class Bench:
    """One sample at a time: seconds of both cases, estimates and exact effects of every cell."""

    def __init__(self, plan: Any) -> None:
        self.plan, self.rows = plan, list(plan.grids[0].interventions())
        self.computer = Computer(plan, load_pipeline(plan.model, dtype="float32", device="cpu"))
        self.seconds: dict[str, list[float]] = {"forward": [], "screen": []}

    def sample(self, number: int) -> dict[str, Floats]:
        """Return estimate, exact change of the objective at the step, and exact change of the final metrics."""
        record, about = self.computer.record(number), self.plan.samples[number]
        ends = [record.final[record.row(run)] for run in RUNS]
        base = self.computer.measure(record, record.final, about)
        found = {name: np.zeros(len(self.rows)) for name in ("estimate", "at_step", *FINAL)}
        for step in sorted({row.step for row in self.rows}):
            at = [i for i, row in enumerate(self.rows) if row.step == step]
            rows, share = [self.rows[i] for i in at], share_of_step(self.plan.geometry.levels, step)
            last = Site(step, "cond", self.plan.geometry.blocks - 1, "residual")

            def objective(x0_hat: torch.Tensor) -> torch.Tensor:
                return OBJECTIVES[OBJECTIVE].compute(x0_hat, *ends)

            for _ in range(2):
                self._time("forward", lambda: self.computer.engine.capture(record, step, [last], range(2)))  # noqa: B023
                estimates = self._time("screen", lambda: screen(self.computer.engine, record, rows, objective))  # noqa: B023
            fork = self.computer.engine.fork(record, rows, keep_x0_hat=True)
            found["estimate"][at] = share * np.array(estimates)
            moved = objective(fork.x0_hat[step]) - objective(record.x0_hat[step])[record.row("corrupted")]
            found["at_step"][at] = share * moved.numpy()
            for name, values in self.computer.measure(record, fork.final, about).items():
                found[name][at] = values - base[name][record.row("corrupted")]
        return found

    def _time(self, case: str, call: Any) -> Any:
        started = time.perf_counter()
        result = call()
        self.seconds[case].append(time.perf_counter() - started)
        return result


def agreement(estimate: Floats, exact: Floats) -> dict[str, float]:
    """Return the rank correlations of values and of sizes, and the recall of the strongest tenth."""
    tenth = max(1, len(exact) // 10)
    strongest = [set(np.argsort(-np.abs(values))[:tenth].tolist()) for values in (estimate, exact)]
    return {
        "spearman": round(float(spearmanr(estimate, exact)[0]), 2),
        "spearman_of_sizes": round(float(spearmanr(np.abs(estimate), np.abs(exact))[0]), 2),
        "recall_of_strongest_tenth": round(len(strongest[0] & strongest[1]) / tenth, 2),
    }


def main() -> None:
    """Time and compare on every ``stride``-th step and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stride", type=int, default=2)
    parser.add_argument("--mazes", type=int, default=4)
    parser.add_argument("--components", default="attn1,attn2,ffn")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(plan_for(args.steps, args.stride, args.mazes, args.components.split(",")))
    samples = [bench.sample(number) for number in range(len(bench.plan.samples))]
    mean = {name: np.mean([found[name] for found in samples], axis=0) for name in samples[0]}
    medians = {case: float(np.median(seconds)) for case, seconds in bench.seconds.items()}
    result = {
        "cells_of_a_step": sum(row.step == bench.rows[0].step for row in bench.rows),
        "samples": len(samples),
        "seconds_of_a_step": {case: round(value, 5) for case, value in medians.items()},
        "screening_in_forwards": round(medians["screen"] / medians["forward"], 2),
        "agreement": {name: agreement(mean["estimate"], mean[name]) for name in ("at_step", *FINAL)},
        "agreement_if_the_step_were_exact": {name: agreement(mean["at_step"], mean[name]) for name in FINAL},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
