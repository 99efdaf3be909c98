"""Sweeps in rounds over replicas without a model, driven by the real driver in this process."""

from __future__ import annotations

import functools
from typing import Any

from cluster import InlinePool
from pipeline.executors import pool_options
from pipeline.plan import Plan
from pipeline.sweep import SweepResult, run_sweep
from tests.planted_units import small_plan
from tests.synthetic import SyntheticReplica, shapes_of

MAP = {"kind": "patch", "step": "all", "layer": [0, 1]}
PRECISION = {"half_width": 1.8, "metric": "goal_evidence", "first": 6, "growth": 1.5}
ENDS = (6, 9, 13)
"""Problems by the end of each round."""


def plan_of(**changes: Any) -> Plan:
    """A plain experiment, one in rounds with two units a sample, and one of a single cell in rounds of its own."""
    experiments = {
        "plain": {"kind": "patch", "step": 1, "layer": [0, 1]},
        "map": {**MAP, "precision": PRECISION},
        "one": {"kind": "patch", "step": 1, "layer": 2, "precision": {**PRECISION, "half_width": 99.0, "first": 7}},
    }
    settings = {"task": {"name": "maze", "mazes": 13}, "previews": {"samples": []}, "unit_cells": 4}
    return small_plan(**{"experiments": experiments, **settings, **changes})


class Scripted(SyntheticReplica):
    """A replica that raises at some units, and finds no value in some cells of others."""

    def __init__(self, *given: Any, raises: frozenset[int] = frozenset(), holes: frozenset[int] = frozenset()) -> None:
        super().__init__(*given)
        self.raises, self.holes, self.ran = raises, holes, []

    def run(self, unit: Any) -> Any:
        if unit.id in self.raises:
            raise RuntimeError("planted failure")
        writes, receipt = self.prepare(unit, spoiled=unit.id in self.holes)
        for *_, write in writes:
            write()
        return receipt


def sweep(plan: Plan, place: Any, observe: Any = None, **script: Any) -> SweepResult:
    def executor(plan: Plan, location: Any) -> InlinePool:
        worker = functools.partial(Scripted, shapes_of(plan), location.address, **script)
        return InlinePool(worker, pool_options(plan))

    return run_sweep(plan, place, make_executor=executor, observe=observe)
