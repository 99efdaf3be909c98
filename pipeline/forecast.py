"""How long a sweep will take: the units of a plan at the prices of a calibration, handed to replicas one by one."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from interventions.sites import RUNS
from pipeline.calibrate import Calibration, CellCost
from pipeline.plan import Plan

MOST_UNITS = 100_000
"""Units that are handed out one by one; of more the mean is as good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Seconds of a sweep.

    Attributes
    ----------
    seconds : of the whole command. compute_s : that replicas compute, all of them together.
    """

    seconds: float
    compute_s: float


def forecast(plan: Plan, calibration: Calibration, *, overhead_s: float = 0.0) -> Forecast:
    """Predict the wall time of a plan's sweep from nothing to its end.

    Parameters
    ----------
    overhead_s : of the command before and after its replicas.
    """
    replicas = max(1, plan.config.run.replicas)
    first, others = baseline_seconds(plan, calibration), list(_units(plan, calibration))
    extra, shown = preview_seconds(plan, calibration), set(plan.config.previews.samples)
    compute = len(plan.samples) * (first + sum(others)) + len(shown) * extra
    busy = compute / replicas
    if len(plan.layout) <= MOST_UNITS:
        free = [0.0] * replicas
        for sample in range(len(plan.samples)):
            for seconds in (first + (extra if sample in shown else 0.0), *others):
                # The replica that is free first takes the next unit.
                heapq.heapreplace(free, free[0] + seconds)
        busy = max(free)
    return Forecast(seconds=overhead_s + calibration.start_s + busy, compute_s=compute)


def baseline_seconds(plan: Plan, calibration: Calibration) -> float:
    """Return the seconds of a sample's baseline: recorded, measured at every step and at its end, screened."""
    steps = plan.geometry.steps
    # Cells that are verified run after all others, when the sample's record is forgotten.
    records = 1 + bool(plan.screened)
    return records * calibration.record_s + (steps + 1) * calibration.measure_s + calibration.screen_s


def preview_seconds(plan: Plan, calibration: Calibration) -> float:
    """Return the seconds of the previews of one sample: every step of both runs decoded, and of a patched one."""
    films = len(RUNS) + (plan.patched is not None)
    patched = calibration.record_s / len(RUNS) if plan.patched is not None else 0.0
    return films * plan.geometry.steps * calibration.preview_s + patched


def _units(plan: Plan, calibration: Calibration) -> Iterator[float]:
    """Yield the seconds of each unit of cells of one sample."""
    mean = _mean(plan, calibration)
    for grid in plan.grids:
        name = grid.experiment.name
        cost = calibration.cells.get(name, mean)
        for window in plan.window_work(name):
            yield window.groups * cost.group_s + window.forwards * cost.forward_s


def _mean(plan: Plan, calibration: Calibration) -> CellCost:
    """Return what a row-forward costs on the mean of the experiments that were timed."""
    seconds = forwards = 0.0
    for name, cost in calibration.cells.items():
        for window in plan.window_work(name):
            seconds += window.groups * cost.group_s + window.forwards * cost.forward_s
            forwards += window.forwards
    return CellCost(group_s=0.0, forward_s=seconds / forwards if forwards else 0.0)
