"""The forecast adds up what a calibration says: arithmetic, so nothing is timed."""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import forecast as module
from pipeline.calibrate import Calibration, CellCost
from pipeline.config import SweepConfig
from pipeline.forecast import baseline_seconds, forecast, preview_seconds
from pipeline.plan import BASELINE, make_plan

STEPS = 4


def plan_of(**changes):
    raw = {
        "name": "forecast",
        "model": {"id": "embedded:maze"},
        "task": {"name": "maze", "mazes": 3, "pairs": ["red/blue"]},
        "sampler": {"steps": STEPS},
        "metrics": ["goal_evidence"],
        "experiments": {
            "map": {"kind": "patch", "step": "all", "layer": [0, 1]},
            "skip": {"kind": "step_skip", "mode": "drop", "step": "all"},
        },
        "previews": {"samples": []},
        "unit_cells": 4,
        "run": {"replicas": 1},
        **changes,
    }
    return make_plan(SweepConfig.model_validate(raw))


@lru_cache
def plan_for(replicas):
    return plan_of(run={"replicas": replicas})


def costs(**changes):
    usual = {
        "record_s": 0.0, "measure_s": 0.0, "preview_s": 0.0, "screen_s": 0.0, "rows": 18,
        "cells": {"map": CellCost(group_s=0.0, forward_s=0.0), "skip": CellCost(group_s=0.0, forward_s=0.0)},
    }  # fmt: skip
    return Calibration(**{**usual, **changes})


class TestParts:
    def test_a_start_and_the_command_itself_are_added(self):
        assert forecast(plan_of(), costs(start_s=3.0), overhead_s=4.0).seconds == 7.0

    def test_a_baseline_is_recorded_and_measured_at_every_step_and_at_the_end(self):
        assert baseline_seconds(plan_of(), costs(record_s=10.0, measure_s=1.0)) == 10 + STEPS + 1

    def test_screened_samples_are_screened_and_recorded_twice(self):
        screened = {
            "map": {
                "kind": "patch",
                "step": "all",
                "layer": "all",
                "screen": {"top": 0.5, "metric": "clean_projection"},
            }
        }
        found = baseline_seconds(plan_of(experiments=screened), costs(record_s=10.0, screen_s=100.0))
        assert found == 2 * 10 + 100

    @pytest.mark.parametrize(
        ("patched", "seconds"),
        [({}, 2 * STEPS), ({"kind": "patch", "step": 1, "layer": 0}, 3 * STEPS + 5)],
        ids=["nothing patched", "one patched"],
    )
    def test_a_preview_decodes_every_step_of_every_run(self, patched, seconds):
        plan = plan_of(previews={"samples": [0], "patched": patched})
        assert preview_seconds(plan, costs(preview_s=1.0, record_s=10.0)) == seconds

    def test_previews_are_of_their_samples_alone(self):
        plan = plan_of(previews={"samples": [0, 2]})
        assert forecast(plan, costs(preview_s=1.0)).compute_s == 2 * preview_seconds(plan, costs(preview_s=1.0))

    def test_cells_cost_by_group_and_by_row_forward(self):
        plan = plan_of()
        # A patch of step s: two rows that compute 4 - s steps, and one capture of a pair of runs.
        forwards = sum(2 * (STEPS - s) + 2 for s in range(STEPS))
        assert sum(work.forwards for work in plan.window_work("map")) == forwards
        priced = costs(
            cells={"map": CellCost(group_s=100.0, forward_s=1.0), "skip": CellCost(group_s=0.0, forward_s=0.0)}
        )
        assert forecast(plan, priced).compute_s == 3 * (100 * STEPS + forwards)

    def test_an_experiment_that_was_not_timed_costs_the_mean(self):
        plan = plan_of()
        forwards = {name: sum(work.forwards for work in plan.window_work(name)) for name in ("map", "skip")}
        found = forecast(plan, costs(cells={"map": CellCost(group_s=0.0, forward_s=2.0)}))
        assert found.compute_s == pytest.approx(3 * 2.0 * (forwards["map"] + forwards["skip"]))


class TestReplicas:
    @pytest.mark.parametrize(("replicas", "seconds"), [(1, 30.0), (2, 20.0), (3, 10.0), (5, 10.0)])
    def test_share_whole_units(self, replicas, seconds):
        plan = plan_of(run={"replicas": replicas})
        assert forecast(plan, costs(record_s=10.0)).seconds == seconds

    def test_none_means_this_process(self):
        assert forecast(plan_of(run={"replicas": 0}), costs(record_s=10.0)).seconds == 30.0

    def test_a_sweep_too_large_to_hand_out_is_shared_evenly(self, monkeypatch):
        monkeypatch.setattr(module, "MOST_UNITS", 5)
        assert forecast(plan_of(run={"replicas": 2}), costs(record_s=10.0)).seconds == 15.0

    @given(st.integers(1, 6), st.floats(0, 10), st.floats(0, 10), st.floats(0, 1))
    @settings(max_examples=30, deadline=None)
    def test_never_faster_than_even_shares_nor_slower_than_one(self, replicas, record, group, row):
        cells = {name: CellCost(group_s=group, forward_s=row) for name in ("map", "skip")}
        found = forecast(plan_for(replicas), costs(record_s=record, cells=cells))
        assert found.compute_s / replicas <= found.seconds * (1 + 1e-9) + 1e-9
        assert found.seconds <= found.compute_s * (1 + 1e-9) + 1e-9


class TestWindowWork:
    def test_adds_up_to_the_cost_of_the_plan(self):
        plan = plan_of()
        windows = sum(work.forwards for grid in plan.grids for work in plan.window_work(grid.experiment.name))
        baseline = 2 * STEPS
        assert plan.cost().row_forwards == 3 * (windows + baseline)

    def test_is_that_of_the_units(self):
        plan = plan_of()
        for unit in plan.units():
            if unit.group != BASELINE:
                rows = plan.interventions(unit)
                work = plan.window_work(unit.group)[unit.index % plan.layout.windows(unit.group).count]
                assert work.groups == len(plan.groups(rows))
                assert work.forwards == plan.unit_forwards(unit)
