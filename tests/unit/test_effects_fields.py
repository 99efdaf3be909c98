"""Effects of fields: the same at every position as plain statistics over prompts, whatever the chunks and threads."""

from __future__ import annotations

import shutil
from functools import reduce
from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.cli import main
from pipeline.effects import compute_effects, fields, open_effects
from pipeline.effects.experiment import Experiment, Recorded
from pipeline.effects.field_state import CUT, FieldMoments, UnitMean, all_finite, cuts
from pipeline.effects.fields import KINDS, FieldMetric, workers
from pipeline.effects.state import Moments
from pipeline.fields import FIELD_DIMS
from pipeline.plan import Plan
from pipeline.report import write_report
from pipeline.report.content import Sweep
from pipeline.store import Store, verify
from tests.planted_units import finish, small_plan

METRICS = ["change_map", "goal_evidence", "frame_change"]
EXPERIMENTS = {
    "map": {"kind": "patch", "step": "all", "layer": "all", "component": ["attn2", "ffn"]},
    "both": {"kind": "patch", "step": "all", "layer": 0, "direction": ["denoising", "noising"]},
    "one": {"kind": "patch", "step": 1, "layer": 2, "direction": "noising"},
    "screened": {
        "kind": "patch",
        "step": "all",
        "layer": "all",
        "screen": {"top": 0.2, "metric": "clean_projection"},
    },
}
TASKS = {
    "one pair": {"mazes": 4, "pairs": ["red/blue"]},
    "seeds": {"mazes": 3, "pairs": ["red/blue"], "seeds": 2},
    "pairs and seeds": {"mazes": 3, "pairs": ["red/blue", "red/any"], "seeds": 2},
}


def plan_of(task: str) -> Plan:
    return small_plan(
        metrics=METRICS, experiments=EXPERIMENTS, task={"name": "maze", **TASKS[task]}, previews={"samples": []}
    )


@pytest.fixture(scope="module", params=list(TASKS))
def made(request, tmp_path_factory) -> tuple[Plan, Path]:
    """A finished store with its effects, and cells that have holes in their field."""
    plan = plan_of(request.param)
    folder = tmp_path_factory.mktemp("made") / "run.zarr"
    holed = [unit.id for unit in plan.units() if unit.group in ("map", "both", "one")][2::5]
    finish(folder, plan, holes=dict.fromkeys(holed, 2))
    compute_effects(folder, replicates=50)
    return plan, folder


def effects_of(folder: Path, name: str) -> xr.Dataset:
    return open_effects(folder)[name].to_dataset().load()


def differences(store: Path, name: str, metric: str) -> np.ndarray:
    """Return metric minus recipient run for every (sample, axes, field), in float64, the slow way."""
    root = zarr.open_group(str(store), mode="r")
    values = np.asarray(root[f"{name}/{metric}"], dtype=np.float64)
    baseline = np.asarray(root[f"baseline/{metric}"], dtype=np.float64)
    clean, corrupted = baseline[:, 0], baseline[:, 1]
    found = values.copy()
    axes = list(root[f"{name}/{metric}"].metadata.dimension_names)
    for index in np.ndindex(values.shape[: len(axes) - len(clean.shape) + 1]):
        recipient = str(root[name].attrs["recipient"])
        if recipient == "by direction":
            direction = str(root[f"{name}/direction"][index[axes.index("direction")]])
            recipient = {"denoising": "corrupted", "noising": "clean"}[direction]
        found[index] -= (clean if recipient == "clean" else corrupted)[index[0]]
    return found


def over_prompts(plan: Plan, values: np.ndarray, pair: str) -> np.ndarray:
    """Average the finite seeds (and pairs) of each prompt; NaN where a prompt has none."""
    chosen = [s for s in plan.samples if pair in ("all", s.pair)]
    prompts = list(dict.fromkeys(s.prompt for s in chosen))
    return np.stack([Moments.of(values[[s.index for s in chosen if s.prompt == p]]).mean for p in prompts])


@pytest.mark.parametrize("metric", ["change_map", "frame_change"])
@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_position_has_the_mean_and_t_interval_over_prompts(made, name, metric):
    plan, folder = made
    effects = effects_of(folder, name)
    for pair in effects["pair"].values:
        units = over_prompts(plan, differences(folder, name, metric), str(pair))
        known = np.isfinite(units)
        n, mean = known.sum(axis=0), Moments.of(units).mean
        se = Moments.of(units).sd / np.sqrt(np.maximum(n, 1))
        reach = np.where(n > 1, se * stats.t.ppf(0.975, np.maximum(n - 1, 1)), np.nan)
        chosen = effects.sel(pair=pair)
        np.testing.assert_array_equal(chosen[f"{metric}_n"], n)
        np.testing.assert_allclose(chosen[f"{metric}_difference"], mean, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(chosen[f"{metric}_difference_low"], mean - reach, rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(chosen[f"{metric}_difference_high"], mean + reach, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["map", "both", "one"])
def test_a_cell_with_holes_fails_once_and_only_its_holes_are_left_out(made, name):
    _, folder = made
    effects = effects_of(folder, name)
    missing = ~np.isfinite(differences(folder, name, "change_map"))
    axes = missing.ndim - 3
    expected = missing.any(axis=(-3, -2, -1)).sum(axis=0)
    np.testing.assert_array_equal(effects["change_map_failed"].sel(pair="all"), expected)
    assert effects["change_map_failed"].ndim == axes
    by_pair = effects["change_map_failed"].isel(pair=slice(1, None)).sum("pair")
    np.testing.assert_array_equal(by_pair, expected)
    np.testing.assert_array_equal(
        effects["change_map_failed"], effects["goal_evidence_failed"], "holes were made in cells of every metric"
    )


def test_cells_that_were_not_to_be_computed_have_not_failed(made):
    _, folder = made
    effects = effects_of(folder, "screened")
    computed = effects["exact"].values == 1
    assert (effects["change_map_failed"] == 0).all()
    assert np.isfinite(effects["change_map_difference"].sel(pair="all").values[computed]).all()
    assert np.isnan(effects["change_map_difference"].sel(pair="all").values[~computed]).all()
    assert (effects["change_map_n"].sel(pair="all").values[~computed] == 0).all()


def test_numbers_keep_their_effects(made, tmp_path):
    """A metric with one number a cell has the same effects with fields beside it as without."""
    _, folder = made
    copy = Path(shutil.copytree(folder, tmp_path / "run.zarr"))
    for path in copy.glob("*/frame_change"), copy.glob("*/change_map"):
        for array in path:
            shutil.rmtree(array)
    compute_effects(copy, replicates=50)
    for name in EXPERIMENTS:
        with_fields, without = effects_of(folder, name), effects_of(copy, name)
        numbers = [str(n) for n in without.data_vars]
        assert set(numbers) == {str(n) for n in with_fields.data_vars if "change" not in str(n)}
        xr.testing.assert_equal(without[numbers], with_fields[numbers].drop_vars(FIELD_DIMS, errors="ignore"))


def test_maps_are_labelled_and_say_what_they_are(made):
    _, folder = made
    effects = effects_of(folder, "map")
    found = {str(n) for n in effects.data_vars if str(n).startswith("change_map")}
    assert found == {f"change_map_{name}" for name in KINDS}
    assert effects["change_map_difference"].dims == ("pair", "step", "layer", "component", *FIELD_DIMS)
    assert "sigma" in effects["change_map_difference"].coords
    assert "no bootstrap, p-values or recovery" in effects.attrs["method_fields"]
    for name, dtype in KINDS.items():
        variable = effects[f"change_map_{name}"]
        assert variable.dtype == dtype
        assert variable.attrs["long_name"]
        assert variable.attrs["description"]


def test_an_experiment_without_fields_says_nothing_of_them(tmp_path):
    finish(tmp_path / "run.zarr", small_plan())
    compute_effects(tmp_path / "run.zarr", replicates=20)
    effects = effects_of(tmp_path / "run.zarr", "map")
    assert "method_fields" not in effects.attrs
    assert not set(FIELD_DIMS) & set(effects.dims)


def test_fields_alone_have_effects_too(tmp_path):
    finish(tmp_path / "run.zarr", small_plan(metrics=["frame_change"]))
    assert compute_effects(tmp_path / "run.zarr", replicates=20) == [
        f"effects/{name}" for name in ("map", "one", "screened")
    ]
    assert effects_of(tmp_path / "run.zarr", "one")["frame_change_difference"].dims == ("pair", "latent_frame")


def test_a_field_without_baseline_is_named_and_skipped(made, tmp_path):
    _, folder = made
    copy = Path(shutil.copytree(folder, tmp_path / "run.zarr"))
    shutil.rmtree(copy / "baseline" / "frame_change")
    compute_effects(copy, replicates=20)
    effects = effects_of(copy, "map")
    assert effects.attrs["metrics_without_baseline"] == "frame_change"
    assert "frame_change_difference" not in effects
    assert "change_map_difference" in effects


class TestParts:
    """How the work is cut must not show."""

    def test_neither_threads_nor_their_number_move_a_bit(self, made, tmp_path, monkeypatch):
        _, folder = made
        copy = Path(shutil.copytree(folder, tmp_path / "run.zarr"))
        expected = effects_of(folder, "map")
        for memory in (1, 2**40):
            monkeypatch.setattr(fields, "MEMORY", memory)
            monkeypatch.setattr(fields, "CPU_COUNT", 7)
            compute_effects(copy, replicates=50)
            xr.testing.assert_identical(effects_of(copy, "map"), expected)

    def test_fewer_samples_a_task_move_only_rounding(self, made, tmp_path):
        _, folder = made
        copy = Path(shutil.copytree(folder, tmp_path / "run.zarr"))
        compute_effects(copy, replicates=50, chunk_samples=1)
        whole, cut = effects_of(folder, "map"), effects_of(copy, "map")
        for name in KINDS:
            np.testing.assert_allclose(
                cut[f"change_map_{name}"], whole[f"change_map_{name}"], rtol=1e-5, atol=1e-6, err_msg=name
            )

    def test_blocks_hold_whole_prompts_each_once(self, made):
        plan, folder = made
        metric = opened(folder, "map")
        for samples in (1, 2, 3, 100):
            blocks = metric.blocks(samples)
            units = [unit for block in blocks for unit in block]
            found = [position for unit in units for _, positions in unit for position in positions]
            assert sorted(found) == list(range(len(plan.samples)))
            assert len(units) == len({s.prompt for s in plan.samples})
            assert len(blocks) <= -(-len(plan.samples) // samples)

    def test_windows_are_the_stored_chunks(self, made):
        plan, folder = made
        for name in ("map", "both", "one"):
            metric = opened(folder, name)
            cells = [tuple(range(w.start, w.stop)) for w in metric.windows]
            extent = plan.by_name[name].shape[0] if plan.by_name[name].shape else 1
            assert [c for window in cells for c in window] == list(range(extent))
            if plan.by_name[name].shape:
                width = metric.values.chunks[1]
                assert all(len(c) == width for c in cells[:-1])

    def test_large_windows_run_one_at_a_time(self, made, monkeypatch):
        _, folder = made
        metric = opened(folder, "map")
        monkeypatch.setattr(fields, "CPU_COUNT", 8)
        assert workers([]) == 8
        for memory, expected in ((3.5, 3), (100.0, 8), (0.5, 1)):
            monkeypatch.setattr(fields, "MEMORY", int(memory * metric.task_bytes()))
            assert workers([metric]) == expected

    def test_maps_are_lazy_until_they_are_written(self, made):
        _, folder = made
        for dims, values in fields.field_variables(opened(folder, "map"), 0.95, 64).values():
            assert dask.is_dask_collection(values)
            assert len(dims) == values.ndim


def opened(folder: Path, name: str) -> FieldMetric:
    return FieldMetric.open(folder, Experiment.open(folder, name), "change_map", Recorded.read(folder, "prompt"))


def test_pending_cells_are_no_failures(tmp_path):
    plan = plan_of("one pair")
    store = finish(tmp_path / "run.zarr", plan)
    states = store.status("map")
    states[:3] = 0
    store.write_status("map", states)
    for unit in (u for u in plan.units() if u.group == "map" and u.index < 3):
        array = store.array("map/change_map")
        array[unit.sample, unit.start : unit.stop] = np.nan
    compute_effects(tmp_path / "run.zarr", replicates=20)
    effects = effects_of(tmp_path / "run.zarr", "map")
    assert effects["change_map_failed"].sum() == 0
    assert sorted(set(effects["change_map_n"].sel(pair="all").values.ravel())) == [2, 3]


def test_damaged_chunks_are_an_error_of_the_command(tmp_path, capsys):
    store = finish(tmp_path / "run.zarr", plan_of("one pair"))
    chunk = next(p for p in sorted((tmp_path / "run.zarr/map/change_map/c").rglob("*")) if p.is_file())
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(bytes(content))
    assert isinstance(store, Store)
    assert main(["effects", str(tmp_path / "run.zarr"), "--replicates", "20"]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert "Traceback" not in said


def test_effects_of_fields_are_checked_by_verify(made, tmp_path):
    _, folder = made
    copy = Path(shutil.copytree(folder, tmp_path / "run.zarr"))
    assert verify(copy).good
    chunk = next(p for p in sorted((copy / "effects/map/change_map_difference/c").rglob("*")) if p.is_file())
    content = bytearray(chunk.read_bytes())
    content[-10] ^= 4
    chunk.write_bytes(bytes(content))
    assert verify(copy).effects == ["effects/map/change_map_difference (unreadable)"]


class TestReport:
    def test_says_which_metrics_are_fields_and_draws_the_others(self, made, tmp_path):
        _, folder = made
        page = write_report(folder, tmp_path / "out").read_text()
        assert "change_map over latent_frame, latent_y, latent_x; frame_change over latent_frame" in page
        assert "effects/map of the store" in page
        assert list((tmp_path / "out").glob("map_goal_evidence*"))
        assert not list((tmp_path / "out").glob("*change*"))

    def test_reads_no_field(self, made):
        _, folder = made
        sweep = Sweep.read(folder)
        assert sweep.metrics == ["goal_evidence"]
        assert sweep.fields["one"] == {"change_map": FIELD_DIMS, "frame_change": ("latent_frame",)}
        for dataset in (sweep.baseline, *sweep.effects.values()):
            assert dataset is not None
            assert not [n for n, v in dataset.data_vars.items() if set(v.dims) & set(FIELD_DIMS)]

    def test_counts_failed_cells_of_fields_and_cells_without_their_positions(self, tmp_path):
        plan = small_plan(metrics=["change_map"])
        unit = next(u for u in plan.units() if u.group == "map")
        finish(tmp_path / "run.zarr", plan, holes={unit.id: 3})
        compute_effects(tmp_path / "run.zarr", replicates=20)
        page = write_report(tmp_path / "run.zarr", tmp_path / "out").read_text()
        assert "change of each latent position: 3" in page
        assert "<td>map</td><td" in page
        assert f">{2 * plan.by_name['map'].cells}<" in page
        assert "No metric of this experiment has effects that can be drawn." in page


SHAPE = (3, 5)


def values_of(seed: int, units: int, holes: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((units, *SHAPE)) * 10 + rng.normal(0, 100)).astype(np.float32)
    values[rng.random(values.shape) < holes] = np.nan
    return values


def moments_of(values: np.ndarray) -> FieldMoments:
    state = FieldMoments.zero(SHAPE)
    for row in values:
        finite = np.isfinite(row)
        state.take(row, None, None if finite.all() else finite)
    return state


def assert_state(state: FieldMoments, values: np.ndarray) -> None:
    expected = Moments.of(values) if len(values) else Moments.zero(SHAPE)
    np.testing.assert_array_equal(state.n, expected.n)
    np.testing.assert_allclose(state.mean[state.n > 0], expected.mean[state.n > 0], rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(state.m2, expected.m2, rtol=1e-9, atol=1e-8)


HOLES = st.sampled_from([0.0, 0.3, 1.0])


class TestMoments:
    @given(st.integers(0, 500), st.integers(0, 9), HOLES)
    @settings(max_examples=40, deadline=None)
    def test_one_by_one_equals_all_at_once(self, seed, units, holes):
        values = values_of(seed, units, holes)
        assert_state(moments_of(values), values)

    @given(st.integers(0, 500), st.lists(st.integers(0, 4), min_size=1, max_size=5), HOLES)
    @settings(max_examples=40, deadline=None)
    def test_merged_parts_equal_the_whole(self, seed, sizes, holes):
        values = values_of(seed, sum(sizes), holes)
        ends = np.cumsum(sizes)
        parts = [moments_of(values[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
        assert_state(reduce(FieldMoments.merge, parts), values)

    @given(st.integers(0, 500), st.integers(1, 5), HOLES)
    @settings(max_examples=40, deadline=None)
    def test_the_mean_over_samples_counts_as_one_unit(self, seed, samples, holes):
        values, state, mean = values_of(seed, samples, holes), FieldMoments.zero(SHAPE), UnitMean.zero(SHAPE)
        for row in values:
            mean.add(row, None, np.isfinite(row))
        mean.into(state)
        assert_state(state, Moments.of(values).mean[None])

    @pytest.mark.parametrize("cells", [1, 3], ids=["one-for-all", "one-a-cell"])
    def test_a_reference_is_subtracted_in_float64(self, cells):
        values = np.full(SHAPE, 1e8, np.float32)
        reference = np.arange(cells * SHAPE[1], dtype=np.float32).reshape(cells, -1)
        state = FieldMoments.zero(SHAPE)
        state.take(values, reference, None)
        np.testing.assert_array_equal(state.mean, 1e8 - np.broadcast_to(reference.astype(np.float64), SHAPE))

    @pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, CUT), (2, 3 * CUT + 1), (CUT + 1, 1), (5, CUT - 1), (0, 4)])
    def test_cuts_take_every_value_once(self, shape):
        taken = np.zeros(shape, np.int64)
        for cut in cuts(*shape):
            assert taken[cut].size <= CUT
            taken[cut] += 1
        assert (taken == 1).all()

    @pytest.mark.parametrize(
        ("change", "answer"),
        [(0.0, True), (np.nan, False), (np.inf, False), (-np.inf, False)],
        ids=["finite", "nan", "inf", "minus-inf"],
    )
    def test_one_value_that_is_not_finite_is_seen(self, change, answer):
        values = np.ones((50, 50), np.float32)
        values[31, 7] += change
        assert all_finite(values) is answer

    def test_both_infinities_do_not_cancel(self):
        values = np.ones((2, 2), np.float32)
        values[0] = np.inf, -np.inf
        assert not all_finite(values)
