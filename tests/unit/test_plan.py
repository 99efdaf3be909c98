"""The plan: every cell in exactly one unit, batches that can share a forward, and a cost that adds up."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.sites import Geometry
from pipeline.config import ConfigError, SweepConfig, load_config
from pipeline.experiment import parse
from pipeline.models import describe
from pipeline.plan import BASELINE, Plan, batch_rows, make_plan

STEPS, LAYERS, FRAMES = 3, 6, 5
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "map": {"kind": "patch", "step": "all", "layer": "all", "component": ["attn2", "ffn"]},
    "one": {"kind": "patch", "step": 1, "layer": 2},
    "skip": {"kind": "step_skip", "mode": ["freeze", "drop", "repeat"], "step": "all"},
    "reuse": {"kind": "step_skip", "mode": "reuse", "step": "1:"},
    "noise": {"kind": "noise", "at": "frame", "path": ["off_path", "on_path"], "frame": "all"},
}


def settings_of(**changes: Any) -> SweepConfig:
    return SweepConfig.model_validate(
        {
            "name": "tiny",
            "model": {"id": "embedded:maze"},
            "task": {"name": "maze", "mazes": 2},
            "sampler": {"steps": STEPS},
            "metrics": ["goal_evidence", "solved"],
            "experiments": EXPERIMENTS,
            **changes,
        }
    )


@lru_cache
def model() -> Any:
    return describe("embedded:maze")


def plan_of(**changes: Any) -> Plan:
    """Bind without reading the model's files again."""
    config = settings_of(**changes)
    task = config.build_task()
    geometry = model().geometry(task, config.sampler)
    grids = tuple(e.bind(geometry) for e in config.build_experiments())
    return Plan(config=config, model=model(), task=task, geometry=geometry, grids=grids, patched=None)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans over random axes, window sizes, samples and batch sizes."""
    axes: dict[str, Any] = {
        "step": draw(st.lists(st.integers(0, STEPS - 1), min_size=1, unique=True)),
        "layer": draw(st.lists(st.integers(0, LAYERS - 1), min_size=1, unique=True)),
        "alpha": draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, unique=True)),
    }
    scalars = {"step": 0, "layer": 0, "alpha": 1.0}
    swept = draw(st.sets(st.sampled_from(sorted(axes))))
    return plan_of(
        task={"name": "maze", "mazes": draw(st.integers(1, 3)), "pairs": ["red/blue", "red/any"]},
        experiments={
            "map": {"kind": "patch", **{k: axes[k] if k in swept else scalars[k] for k in axes}},
            "skip": {"kind": "step_skip", "mode": draw(st.sampled_from(["drop", ["drop", "repeat"]])), "step": "all"},
        },
        unit_cells=draw(st.integers(1, 40)),
        engine={"batch_rows": draw(st.integers(1, 9))},
    )


class TestUnits:
    @given(plans())
    @settings(max_examples=60, deadline=None)
    def test_every_cell_of_every_sample_is_in_exactly_one_unit(self, plan):
        seen = Counter(
            (unit.group, unit.sample, intervention)
            for unit in plan.units()
            if unit.group != BASELINE
            for intervention in plan.interventions(unit)
        )
        expected = Counter(
            (grid.experiment.name, sample, intervention)
            for grid in plan.grids
            for sample in range(len(plan.samples))
            for intervention in grid.interventions()
        )
        assert seen == expected

    @given(plans())
    @settings(max_examples=30, deadline=None)
    def test_ids_count_from_zero_and_each_status_has_one_unit(self, plan):
        units = list(plan.units())
        assert [u.id for u in units] == list(range(len(units)))
        places = Counter((u.group, u.index) for u in units)
        assert set(places.values()) == {1}
        for group in (BASELINE, *plan.by_name):
            indices = sorted(u.index for u in units if u.group == group)
            assert indices == list(range(plan.group_units(group)))

    @given(plans())
    @settings(max_examples=30, deadline=None)
    def test_windows_are_whole_chunks(self, plan):
        for unit in plan.units():
            if unit.group == BASELINE:
                continue
            grid = plan.by_name[unit.group]
            width, length = plan.window(grid), grid.shape[0] if grid.shape else 1
            assert unit.start % width == 0
            assert unit.stop == min(unit.start + width, length)
            assert 1 <= width <= length

    @given(plans())
    @settings(max_examples=20, deadline=None)
    def test_units_of_a_sample_follow_its_baseline(self, plan):
        for sample, units in itertools.groupby(plan.units(), key=lambda u: u.sample):
            groups = [u.group for u in units]
            assert groups[0] == BASELINE
            assert groups.count(BASELINE) == 1, f"sample {sample} comes twice"

    def test_same_config_gives_the_same_units(self):
        assert list(plan_of().units()) == list(plan_of().units())

    @pytest.mark.parametrize(
        ("unit_cells", "width"),
        [
            pytest.param(1, 1, id="less-than-a-position"),
            pytest.param(12, 1, id="one-position"),
            pytest.param(24, 2, id="two-positions"),
            pytest.param(10_000, STEPS, id="more-than-the-grid"),
        ],
    )
    def test_window_comes_near_the_asked_cells(self, unit_cells, width):
        plan = plan_of(unit_cells=unit_cells)
        assert plan.window(plan.by_name["map"]) == width

    def test_experiment_without_axes_is_one_unit_a_sample(self):
        plan = plan_of()
        (first, second) = (u for u in plan.units() if u.group == "one")
        assert (first.start, first.stop, first.index, second.index) == (0, 1, 0, 1)
        assert len(plan.interventions(first)) == 1


class TestBatches:
    GEOMETRY = Geometry(steps=4, blocks=3, frames=3, given_frames=1, height=1, width=1)

    def rows(self, raw: dict[str, Any]) -> list[Any]:
        return list(parse("x", raw).bind(self.GEOMETRY).interventions())

    @given(plans())
    @settings(max_examples=40, deadline=None)
    def test_batches_partition_the_rows_of_a_unit(self, plan):
        for unit in plan.units():
            if unit.group != BASELINE:
                rows = plan.interventions(unit)
                batches = plan.batches(rows)
                assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
                assert all(1 <= len(batch) <= plan.config.engine.batch_rows for batch in batches)

    @given(st.permutations(range(24)), st.integers(1, 30))
    def test_rows_of_a_batch_share_schedule_and_first_step(self, order, limit):
        mixed = [
            *self.rows({"kind": "step_skip", "mode": ["freeze", "drop", "repeat"], "step": "all"}),
            *self.rows({"kind": "patch", "step": "all", "layer": "all"}),
        ]
        rows = [mixed[i] for i in order]
        for batch in batch_rows(rows, self.GEOMETRY, limit):
            shared = {(rows[i].schedule, rows[i].first_computed_step(self.GEOMETRY)) for i in batch}
            assert len(shared) == 1

    def test_rows_of_one_step_fill_a_batch(self):
        rows = self.rows({"kind": "patch", "step": 2, "layer": "all", "alpha": [0.5, 1]})
        assert batch_rows(rows, self.GEOMETRY, 4) == [[0, 1, 2, 3], [4, 5]]

    def test_drops_of_different_steps_never_share(self):
        rows = self.rows({"kind": "step_skip", "mode": "drop", "step": "all"})
        assert batch_rows(rows, self.GEOMETRY, 10) == [[0], [1], [2], [3]]

    def test_no_rows_are_no_batches(self):
        assert batch_rows([], self.GEOMETRY, 3) == []


class TestCost:
    @given(plans())
    @settings(max_examples=30, deadline=None)
    def test_forwards_are_those_of_all_batches_and_baselines(self, plan):
        branches = len(plan.geometry.branches)
        forwards = 0
        for unit in plan.units():
            if unit.group == BASELINE:
                forwards += 2 * plan.geometry.steps * branches
                continue
            rows = plan.interventions(unit)
            forwards += sum(plan.batch_forwards([rows[i] for i in batch]) for batch in plan.batches(rows))
        assert plan.cost().row_forwards == forwards

    @given(plans())
    @settings(max_examples=20, deadline=None)
    def test_cells_and_units_are_those_of_the_plan(self, plan):
        units = list(plan.units())
        cost = plan.cost()
        assert cost.units == len(units)
        assert cost.cells == sum(len(plan.interventions(u)) for u in units if u.group != BASELINE)

    @pytest.mark.parametrize(
        ("experiment", "forwards"),
        [
            pytest.param(
                {"kind": "patch", "step": 0, "layer": 0}, 2 + 3, id="patch-at-the-first-step-computes-all-steps"
            ),
            pytest.param({"kind": "patch", "step": 2, "layer": 0}, 2 + 1, id="patch-at-the-last-step-computes-one"),
            pytest.param(
                {"kind": "patch", "step": 2, "layer": [0, 1, 2]}, 2 + 3, id="rows-of-a-batch-share-the-capture"
            ),
            pytest.param({"kind": "noise", "at": "step", "step": 1}, 2, id="noise-needs-no-donor"),
            pytest.param({"kind": "noise", "at": "frame", "frame": 1}, 3, id="noise-at-a-frame-computes-all-steps"),
            pytest.param({"kind": "step_skip", "mode": "freeze", "step": 1}, 1, id="freeze-saves-its-step"),
            pytest.param({"kind": "step_skip", "mode": "drop", "step": 2}, 0, id="drop-of-the-last-step-is-free"),
            pytest.param(
                {"kind": "step_skip", "mode": "repeat", "step": 2}, 1, id="repeat-of-the-last-step-computes-it-again"
            ),
            pytest.param(
                {"kind": "step_skip", "mode": "reuse", "step": 2}, 0, id="reuse-of-the-last-prediction-is-free"
            ),
        ],
    )
    def test_forwards_of_one_sample(self, experiment, forwards):
        plan = plan_of(task={"name": "maze", "mazes": 1}, experiments={"x": experiment})
        assert plan.cost().row_forwards == 2 * STEPS + forwards

    def test_guidance_doubles_the_forwards(self):
        plain = plan_of().cost().row_forwards
        assert plan_of(sampler={"steps": STEPS, "guidance_scale": 3.0}).cost().row_forwards == 2 * plain

    def test_samples_multiply_everything_but_nothing_else(self):
        one = plan_of(task={"name": "maze", "mazes": 1}, previews={"samples": []}).cost()
        three = plan_of(task={"name": "maze", "mazes": 3}, previews={"samples": []}).cost()
        for name in ("cells", "units", "row_forwards", "naive_row_forwards", "bytes"):
            assert getattr(three, name) == 3 * getattr(one, name), name

    def test_previews_count_every_frame_of_three_films(self):
        without, with_one = (plan_of(previews={"samples": chosen}).cost().bytes for chosen in ([], [0]))
        assert with_one - without == 3 * STEPS * 6 * 5 * 5 * 3

    def test_naive_cost_is_a_full_run_a_cell(self):
        cost = plan_of(task={"name": "maze", "mazes": 1}).cost()
        assert cost.naive_row_forwards == (cost.cells + 2) * STEPS

    def test_late_interventions_cost_less_than_naively(self):
        cost = plan_of(
            experiments={"map": {"kind": "patch", "step": "all", "layer": "all", "component": ["attn2", "ffn"]}}
        ).cost()
        assert cost.row_forwards < cost.naive_row_forwards

    def test_unit_size_changes_no_count_of_cells(self):
        assert plan_of(unit_cells=1).cost().cells == plan_of(unit_cells=1000).cost().cells


class TestBinding:
    def test_patched_preview_is_bound(self):
        raw = {"kind": "patch", "step": 1, "layer": 0, "component": "residual"}
        plan = make_plan(settings_of(previews={"patched": raw}))
        assert plan.patched is not None
        assert plan.patched.model_dump(include=raw.keys()) == raw

    def test_no_patched_preview_is_none(self):
        assert make_plan(settings_of()).patched is None

    def test_metrics_and_samples_keep_their_order(self):
        plan = make_plan(settings_of(metrics=["solved", "goal_evidence"]))
        assert [m.name for m in plan.metrics] == ["solved", "goal_evidence"]
        assert [s.index for s in plan.samples] == [0, 1]

    def test_geometry_is_that_of_the_model_and_sampler(self):
        geometry = make_plan(settings_of()).geometry
        assert (geometry.steps, geometry.blocks, geometry.branches) == (STEPS, LAYERS, ("cond",))

    def test_problems_without_a_file_are_named_after_the_config(self):
        with pytest.raises(ConfigError, match=r"^config: experiments\.x\.step: 9 is out of range"):
            make_plan(settings_of(experiments={"x": {"kind": "step_skip", "mode": "drop", "step": 9}}))

    def test_file_that_is_gone_since_it_was_read_costs_only_the_line(self, tmp_path):
        path = tmp_path / "c.yaml"
        path.write_text(
            "name: t\nmodel: {id: 'embedded:maze'}\ntask: {name: maze}\nmetrics: [solved]\nsampler: {steps: 3}\n"
            "experiments: {x: {kind: step_skip, mode: drop, step: 9}}\n"
        )
        config = load_config(path)
        path.unlink()
        with pytest.raises(ConfigError, match=rf"^{path}: experiments\.x\.step: 9 is out of range"):
            make_plan(config, path)

    def test_unknown_model_is_refused(self):
        with pytest.raises(
            ConfigError, match=r"unknown embedded model 'embedded:mazes'\. Did you mean 'embedded:maze'\?"
        ):
            make_plan(settings_of(model={"id": "embedded:mazes"}))


class TestSamples:
    def samples(self, **task: Any) -> list[Any]:
        return settings_of(task={"name": "maze", **task}).build_task().samples()

    def test_count_is_mazes_times_seeds_times_pairs(self):
        assert len(self.samples(mazes=3, seeds=2, pairs=["red/blue", "red/any"])) == 12

    def test_indices_are_positions(self):
        samples = self.samples(mazes=3, seeds=2)
        assert [s.index for s in samples] == list(range(6))

    def test_seeds_of_a_maze_are_one_problem(self):
        assert {s.prompt for s in self.samples(mazes=1, seeds=3, pairs=["red/blue", "red/any"])} == {"maze-00000"}

    def test_pairs_are_split(self):
        (sample,) = self.samples(mazes=1, pairs=["blue/any"])
        assert (sample.clean_prompt, sample.corrupted_prompt) == ("blue", "any")

    def test_first_maze_shifts_the_range(self):
        shifted = [s.prompt for s in self.samples(mazes=2, first_maze=5)]
        assert shifted == ["maze-00005", "maze-00006"]
        assert [s.index for s in self.samples(mazes=2, first_maze=5)] == [0, 1]
