"""A short calibration: what a sample, and the cells of each experiment, cost a replica on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.layout import Unit
from pipeline.models import ModelError
from pipeline.plan import Plan

if TYPE_CHECKING:
    from pipeline.experiment import Grid
    from pipeline.replica import Computer

BUDGET_S = 20.0
"""After so long no further experiment is timed; the others are taken for its mean."""
_SHORT_S = 0.5
_TRIALS, _LEAST_TRIALS = 8, 2
"""Groups that are timed of all experiments together, about, and of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellCost:
    """Seconds of the cells of an experiment: for every group that shares its forwards, and for every row-forward."""

    group_s: float
    forward_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a replica was seen to need, in seconds.

    Attributes
    ----------
    start_s : from the start of its process to its first unit. record_s, measure_s : to record the pair of runs of a
        sample, and to decode and measure one step of both. preview_s : to decode one frame strip's step of one run.
    screen_s : to estimate all screened cells of a sample. cells : by experiment, those that were timed.
    rows : the most rows that share a forward, as they were when it was timed.
    """

    record_s: float
    measure_s: float
    preview_s: float
    screen_s: float
    cells: dict[str, CellCost]
    rows: int
    start_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any]) -> Calibration:
        """Return the calibration of plain data."""
        return cls(**{**data, "cells": {name: CellCost(**cost) for name, cost in data["cells"].items()}})


def calibrate(computer: Computer, *, budget_s: float = BUDGET_S) -> Calibration:
    """Time what a replica does on the first sample: its runs, a step's metrics, and groups of each experiment.

    Raises
    ------
    ModelError : the pipeline refuses its call.
    """
    plan = computer.plan
    began = time.perf_counter()
    try:
        record = computer.record(0)
    except ValueError as error:
        # The pipeline's own checks of its call, which no plan can know.
        raise ModelError(f"model {plan.model.id!r} refuses this run: {error}") from error
    record_s = time.perf_counter() - began
    about = plan.samples[0]
    measure_s = _seconds(lambda: computer.measure(record, record.x0_hat[0], about))
    latents, frames = record.x0_hat[0][:1], plan.geometry.frames
    shown = bool(plan.config.previews.samples)
    return Calibration(
        record_s=record_s,
        measure_s=measure_s,
        preview_s=_seconds(lambda: plan.task.preview(computer.pipe, latents, frames)) if shown else 0.0,
        screen_s=sum(_once(lambda grid=grid: computer.estimates(grid, 0)) for grid in plan.screened),  # type: ignore[misc]
        cells=_cell_costs(computer, budget_s),
        rows=plan.rows,
    )


def _cell_costs(computer: Computer, budget_s: float) -> dict[str, CellCost]:
    plan, began = computer.plan, time.perf_counter()
    work = {name: sum(w.forwards for w in plan.window_work(name)) for name in plan.by_name}
    found: dict[str, CellCost] = {}
    for name in sorted(work, key=lambda name: -work[name]):
        if found and time.perf_counter() - began > budget_s:
            break
        # What counts most is timed most.
        count = max(_LEAST_TRIALS, round(_TRIALS * work[name] / max(1, sum(work.values()))))
        found[name] = _cost_of(computer, plan.by_name[name], count)
    return found


def _cost_of(computer: Computer, grid: Grid, count: int) -> CellCost:
    """Time groups from the one with the fewest forwards to the one with the most."""
    trials = sorted(_trials(computer.plan, grid), key=lambda trial: trial.forwards)
    last = len(trials) - 1
    taken = [trials[i] for i in sorted({round(k * last / (count - 1)) for k in range(count)})]
    seconds = [_seconds(lambda trial=trial: computer.cells(trial.unit, trial.chosen)) for trial in taken]  # type: ignore[misc]
    return cost_through([trial.forwards for trial in taken], seconds)


def cost_through(forwards: Sequence[int], seconds: Sequence[float]) -> CellCost:
    """Return the costs whose line comes nearest to what some groups took, by least squares."""
    middle, mean = fmean(forwards), fmean(seconds)
    spread = sum((f - middle) ** 2 for f in forwards)
    if spread:
        slope = sum((f - middle) * (s - mean) for f, s in zip(forwards, seconds, strict=True)) / spread
        group_s = mean - slope * middle
        if slope >= 0 and group_s >= 0:
            return CellCost(group_s=group_s, forward_s=slope)
    # All alike, or times that fall, or rise more than in proportion, which is noise.
    return CellCost(group_s=0.0, forward_s=mean / max(1, middle))


@dataclass(frozen=True, slots=True)
class _Trial:
    """One group of cells of a unit: which they are, and its row-forwards."""

    unit: Unit
    chosen: NDArray[np.bool_]
    forwards: int


def _trials(plan: Plan, grid: Grid) -> Iterator[_Trial]:
    """Yield the groups of the first, the middle and the last unit of an experiment."""
    windows = plan.layout.windows(grid.experiment.name)
    for window in sorted({0, windows.count // 2, windows.count - 1}):
        start, stop = windows.bounds(window)
        unit = Unit(id=0, group=grid.experiment.name, index=window, sample=0, start=start, stop=stop)
        rows = plan.interventions(unit)
        for members in plan.groups(rows):
            chosen = np.zeros(len(rows), dtype=np.bool_)
            chosen[members] = True
            cells = [rows[i] for i in members]
            forwards = sum(plan.batch_forwards([cells[i] for i in b]) for b in plan.batches(cells))
            yield _Trial(unit, chosen, forwards)


def _once(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _seconds(work: Callable[[], object]) -> float:
    """Time some work; if it is short, twice more, as the first time may have loaded something."""
    seconds = _once(work)
    return (_once(work) + _once(work)) / 2 if seconds < _SHORT_S else seconds
