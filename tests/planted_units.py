"""Finished stores without a model: every unit holds random numbers of its own, and receipts as a replica gives."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.config import SweepConfig
from pipeline.plan import BASELINE, Plan, Unit, make_plan
from pipeline.screening import ESTIMATE, mean_over_samples, select
from pipeline.store import DONE, FAILED, Journal, Place, Store, count_failed, digest_of, open_or_create, states_of

EXPERIMENTS: dict[str, Any] = {
    "map": {"kind": "patch", "step": "all", "layer": "all", "component": ["attn2", "ffn"]},
    "one": {"kind": "patch", "step": 1, "layer": 2, "direction": "noising"},
    "screened": {
        "kind": "patch",
        "step": "all",
        "layer": "all",
        "component": ["attn1"],
        "screen": {"top": 0.2, "metric": "clean_projection"},
    },
}


def small_plan(**changes: Any) -> Plan:
    """A plan with a baseline, previews, an experiment without axes and a screened one."""
    raw = {
        "name": "tiny",
        "model": {"id": "embedded:maze"},
        "task": {"name": "maze", "mazes": 2},
        "sampler": {"steps": 3},
        "metrics": ["goal_evidence", "solved"],
        "experiments": EXPERIMENTS,
        "previews": {"samples": [1], "patched": {"kind": "patch", "step": 1, "layer": 0}},
        "unit_cells": 24,
        **changes,
    }
    return make_plan(SweepConfig.model_validate(raw))


def write_unit(store: Store, plan: Plan, unit: Unit, holes: int = 0) -> dict[str, Any]:
    """Write a unit's numbers, a function of the unit alone, and return its receipt.

    Parameters
    ----------
    holes : cells without a value.
    """
    rng = np.random.default_rng([7, unit.id])
    regions: list[tuple[str, dict[str, Any], int]] = []
    if unit.group == BASELINE:
        own = {}
        for metric in plan.metrics:
            own[metric.name] = rng.standard_normal((2, *plan.field_shape(metric))).astype(np.float32)
            if not metric.dims:
                own[f"{metric.name}_by_step"] = rng.standard_normal((2, plan.geometry.steps)).astype(np.float32)
            _spoil(own[metric.name], range(holes))
        failed = count_failed(own, 1)
        regions.append((BASELINE, own, unit.sample))
        for grid in plan.screened:
            estimates = rng.standard_normal(grid.shape).astype(np.float32)
            regions.append((grid.experiment.name, {ESTIMATE: estimates}, unit.sample))
        if unit.sample in plan.config.previews.samples:
            shape = store.array("previews/x0_hat").shape[1:]
            position = plan.config.previews.samples.index(unit.sample)
            regions.append(("previews", {"x0_hat": rng.integers(0, 256, shape).astype(np.uint8)}, position))
        digest = digest_of({f"{group}/{name}": v for group, values, _ in regions for name, v in values.items()})
        written = sum(store.write_sample(*region) for region in regions)
    else:
        grid = plan.by_name[unit.group]
        shape = (unit.stop - unit.start, *grid.shape[1:]) if grid.shape else ()
        chosen = np.ones(int(np.prod(shape)), dtype=np.bool_)
        if plan.verifies(unit):
            found = store.chosen(unit.group, unit.start, unit.stop)
            assert found is not None
            chosen = found
        fields = {m.name: plan.field_shape(m) for m in plan.metrics}
        cells = {name: rng.standard_normal((chosen.size, *f)).astype(np.float32) for name, f in fields.items()}
        for values in cells.values():
            values[~chosen] = np.nan
            _spoil(values, np.flatnonzero(chosen)[:holes])
        failed = count_failed({name: values[chosen] for name, values in cells.items()}, 1)
        shaped = {name: values.reshape((*shape, *fields[name])) for name, values in cells.items()}
        digest = digest_of({f"{unit.group}/{name}": value for name, value in shaped.items()})
        written = store.write_cells(unit.group, shaped, unit.sample, unit.start, unit.stop)
    return {"group": unit.group, "index": unit.index, "failed": failed, "bytes": written, "digest": digest}


def _spoil(values: np.ndarray, cells: Any) -> None:
    """Leave cells without a value; of a field, without one at two positions."""
    for cell in cells:
        values.reshape(len(values), -1)[cell, :2] = np.nan


def choose(store: Store, plan: Plan) -> None:
    """Choose the cells of every screened experiment whose choice is open."""
    for grid in plan.screened:
        name, screen = grid.experiment.name, grid.experiment.screen
        assert screen is not None
        if store.chosen(name, 0, grid.shape[0]) is None:
            store.write_selection(name, select(mean_over_samples(store.estimates(name)), screen))


def finish(place: Place, plan: Plan, *, holes: dict[int, int] | None = None) -> Store:
    """Create a store or open it, and write every unit that is pending, as a driver would.

    Parameters
    ----------
    holes : number of cells without a value by unit id.
    """
    store = open_or_create(place, plan)
    journal, states = Journal(store.location), states_of(store)
    todo = [unit for unit in plan.units() if states[unit.group][unit.index] != DONE]
    for verifying in (False, True):
        for unit in todo:
            if plan.verifies(unit) == verifying:
                receipt = write_unit(store, plan, unit, (holes or {}).get(unit.id, 0))
                journal.append(unit=unit.id, **receipt)
                states[unit.group][unit.index] = FAILED if receipt["failed"] else DONE
        choose(store, plan)
    journal.close()
    for group, values in states.items():
        store.write_status(group, values)
    return store
