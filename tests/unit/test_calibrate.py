"""A calibration times real work of the plan; the clock is replaced, so that every figure is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import calibrate as module
from pipeline.calibrate import Calibration, CellCost, calibrate, cost_through
from pipeline.config import SweepConfig
from pipeline.models import ModelError
from pipeline.plan import make_plan


class Clock:
    """Seconds that pass only when work is done."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Worked:
    """Stands for a computer: its work takes a known time, and it remembers which cells it computed."""

    def __init__(self, plan, clock, *, group_s=3.0, forward_s=0.5, record_s=10.0, measure_s=2.0, preview_s=0.25):
        self.plan, self.clock, self.pipe = plan, clock, None
        self.group_s, self.forward_s, self.record_s, self.measure_s = group_s, forward_s, record_s, measure_s
        self.computed: list[tuple[str, int]] = []

    def record(self, sample):
        self.clock.now += self.record_s
        return SimpleNamespace(x0_hat=[np.zeros((2, 1))], final=None)

    def measure(self, record, latents, sample):
        self.clock.now += self.measure_s

    def cells(self, unit, chosen):
        rows = self.plan.interventions(unit)
        cells = [rows[i] for i in np.flatnonzero(chosen)]
        assert len(self.plan.groups(cells)) == 1, "one group is timed at a time"
        forwards = sum(self.plan.batch_forwards([cells[i] for i in b]) for b in self.plan.batches(cells))
        self.clock.now += self.group_s + self.forward_s * forwards
        self.computed.append((unit.group, forwards))


def plan_of(**changes):
    raw = {
        "name": "calibrate",
        "model": {"id": "embedded:maze"},
        "task": {"name": "maze", "mazes": 1, "pairs": ["red/blue"]},
        "sampler": {"steps": 4},
        "metrics": ["goal_evidence"],
        "experiments": {
            "few": {"kind": "step_skip", "mode": "drop", "step": [1]},
            "map": {"kind": "patch", "step": "all", "layer": [0, 1]},
        },
        "previews": {"samples": []},
        **changes,
    }
    return make_plan(SweepConfig.model_validate(raw))


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(module.time, "perf_counter", found.perf_counter)
    return found


class TestCosts:
    def test_the_line_through_the_smallest_and_the_largest_group(self, clock):
        found = calibrate(Worked(plan_of(), clock), budget_s=1e9)
        assert found.cells["map"] == CellCost(group_s=pytest.approx(3.0), forward_s=pytest.approx(0.5))

    def test_an_experiment_with_groups_of_one_size_costs_by_the_forward(self, clock):
        worked = Worked(plan_of(), clock)
        found = calibrate(worked, budget_s=1e9)
        (forwards,) = {n for group, n in worked.computed if group == "few"}
        assert found.cells["few"] == CellCost(group_s=0.0, forward_s=pytest.approx(0.5 + 3.0 / forwards))

    def test_times_that_rise_more_than_in_proportion_leave_nothing_for_the_group(self, clock):
        found = calibrate(Worked(plan_of(), clock, group_s=-1.0))
        assert found.cells["map"].group_s == 0
        assert 0 < found.cells["map"].forward_s < 0.5

    def test_samples_and_steps(self, clock):
        found = calibrate(Worked(plan_of(), clock), budget_s=1e9)
        assert (found.record_s, found.measure_s, found.preview_s, found.screen_s) == (10.0, 2.0, 0.0, 0.0)

    def test_previews_are_decoded_only_if_any_are_kept(self, clock, monkeypatch):
        plan = plan_of(previews={"samples": [0]})

        def preview(self, pipe, latents, frames):
            clock.now += 0.25
            assert len(latents) == 1

        monkeypatch.setattr(type(plan.task), "preview", preview)
        assert calibrate(Worked(plan, clock)).preview_s == 0.25

    def test_the_dearest_experiments_come_first_and_the_budget_ends_it(self, clock):
        worked = Worked(plan_of(), clock)
        found = calibrate(worked, budget_s=0.0)
        assert list(found.cells) == ["map"]
        assert {group for group, _ in worked.computed} == {"map"}

    def test_rows_are_those_of_the_plan(self, clock):
        assert calibrate(Worked(plan_of(engine={"batch_rows": "auto"}).with_rows(5), clock)).rows == 5

    def test_a_pipeline_that_refuses_its_call_is_named(self, clock):
        class Refuses(Worked):
            def record(self, sample):
                raise ValueError("height must be divisible by 16")

        with pytest.raises(ModelError, match=r"model 'embedded:maze' refuses this run: height must be divisible by 16"):
            calibrate(Refuses(plan_of(), clock))


class TestLine:
    @pytest.mark.parametrize(
        ("forwards", "seconds", "group_s", "forward_s"),
        [
            pytest.param([2, 10], [5.0, 9.0], 4.0, 0.5, id="through-two"),
            pytest.param([2, 6, 10], [5.0, 7.0, 9.0], 4.0, 0.5, id="through-three"),
            pytest.param([1, 2, 3], [2.0, 5.0, 2.0], 3.0, 0.0, id="between-what-is-disturbed"),
            pytest.param([4], [8.0], 0.0, 2.0, id="one"),
            pytest.param([4, 4], [8.0, 10.0], 0.0, 2.25, id="alike"),
            pytest.param([2, 10], [9.0, 5.0], 0.0, 7 / 6, id="falling"),
            pytest.param([2, 10], [1.0, 9.0], 0.0, 5 / 6, id="more-than-in-proportion"),
            pytest.param([0], [3.0], 0.0, 3.0, id="nothing-computed"),
        ],
    )
    def test_of_some_times(self, forwards, seconds, group_s, forward_s):
        found = cost_through(forwards, seconds)
        assert (found.group_s, found.forward_s) == (pytest.approx(group_s), pytest.approx(forward_s))

    @given(st.lists(st.tuples(st.integers(0, 500), st.floats(0, 100)), min_size=1, max_size=8))
    def test_no_cost_is_below_nothing_and_the_mean_is_kept(self, found):
        forwards, seconds = [f for f, _ in found], [s for _, s in found]
        cost = cost_through(forwards, seconds)
        assert cost.group_s >= 0
        assert cost.forward_s >= 0
        if sum(forwards) >= len(forwards):
            total = sum(cost.group_s + cost.forward_s * f for f in forwards)
            assert total == pytest.approx(sum(seconds), rel=1e-6, abs=1e-6)


def test_survives_being_sent_as_data():
    found = Calibration(
        record_s=1.0, measure_s=2.0, preview_s=3.0, screen_s=4.0, start_s=5.0, rows=6,
        cells={"map": CellCost(group_s=7.0, forward_s=8.0)},
    )  # fmt: skip
    assert Calibration.of(found.as_dict()) == found
