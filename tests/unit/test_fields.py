"""Metrics that are a field: their values, what the guard refuses, and how the store keeps and accounts for them."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.base import KINDS
from pipeline.fields import FIELD_DIMS, axes_of, field_dims_of, field_shape, require_field_dims
from pipeline.listing import tasks
from pipeline.metrics.metric import METRICS, Metric, MetricInput, guarded, no_video, register_metric
from pipeline.plan import Plan
from pipeline.store import Store, StoreError, count_failed, export_store, open_or_create, verify
from pipeline.store.contents import Contents, consolidated
from pipeline.store.template import template_of
from tests.planted_units import finish, small_plan
from tests.unit.test_metrics import make_sample

FIELDS = ("frame_change", "change_map")
LATENT = (3, 4, 5, 6)
"""Channels, frames, height, width."""
MAZE = (6, 10, 10)


def rows_of(latents: np.ndarray, recipients: tuple[str, ...] | None = None, seed: int = 0) -> MetricInput:
    rng = np.random.default_rng(seed)
    clean, corrupted = rng.standard_normal((2, *latents.shape[1:])).astype(np.float32)
    return MetricInput(
        video=no_video(len(latents)),
        latents=latents.astype(np.float32),
        clean=clean,
        corrupted=corrupted,
        sample=make_sample(),
        recipients=("clean",) * len(latents) if recipients is None else recipients,  # type: ignore[arg-type]
    )


def changed(rows: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, *LATENT))


class TestDimensions:
    def test_axes_and_field_are_told_apart_by_name(self):
        dims = ("sample", "step", "frame", "latent_frame", "latent_x")
        assert axes_of(dims) == ("sample", "step", "frame")
        assert field_dims_of(dims) == ("latent_frame", "latent_x")

    @pytest.mark.parametrize(
        ("dims", "shape"),
        [((), ()), (("latent_frame",), (4,)), (("latent_y", "latent_x"), (5, 6)), (FIELD_DIMS, (4, 5, 6))],
        ids=["number", "frames", "plane", "all"],
    )
    def test_sizes_are_those_of_the_latents(self, dims, shape):
        assert field_shape(dims, LATENT[1:]) == shape

    @pytest.mark.parametrize(
        "dims", [("frame",), ("latent_x", "latent_frame"), ("latent_y", "latent_y")], ids=["axis", "order", "twice"]
    )
    def test_other_dimensions_are_refused(self, dims):
        with pytest.raises(ValueError, match=r"metric 'm' has dimensions .* Give some of latent_frame, latent_y"):
            require_field_dims("m", dims)
        with pytest.raises(ValueError, match="metric 'm' has dimensions"):
            register_metric(
                Metric(name="m", long_name="m", description="m.", tasks=(), dims=dims, compute=lambda g: g.video)
            )
        assert "m" not in METRICS

    def test_no_axis_of_an_experiment_has_such_a_name(self):
        assert not {field for cls in KINDS.values() for field in cls.model_fields} & set(FIELD_DIMS)


class TestValues:
    @pytest.mark.parametrize("name", FIELDS)
    def test_a_field_metric_is_of_latents_of_any_task(self, name):
        metric = METRICS[name]
        assert metric.dims == (FIELD_DIMS if name == "change_map" else FIELD_DIMS[:1])
        assert (metric.reads_video, metric.floor, metric.tasks) == (False, None, ())
        assert metric.description.endswith(".")
        (line,) = [line for line in tasks() if line.startswith(f"  {name} ")]
        assert f"(any task; a field over {', '.join(metric.dims)})" in line

    def test_change_map_is_the_root_mean_square_over_channels(self):
        shown = rows_of(np.zeros((2, *LATENT)))
        latents = np.stack([shown.clean, shown.clean])
        latents[1, :, 2, 3, 4] += (1, 2, 2)
        values = METRICS["change_map"].compute(rows_of(latents))
        expected = np.zeros((2, *LATENT[1:]))
        expected[1, 2, 3, 4] = np.sqrt(3)
        np.testing.assert_allclose(values, expected, atol=1e-6)

    def test_frame_change_is_the_root_mean_square_over_the_frame(self):
        shown = rows_of(np.zeros((1, *LATENT)))
        latents = shown.clean[None].copy()
        latents[0, :, 1] += 2
        values = METRICS["frame_change"].compute(rows_of(latents))
        np.testing.assert_allclose(values, [[0, 2, 0, 0]], atol=1e-6)

    @given(st.integers(0, 1000), st.integers(1, 3))
    @settings(max_examples=20, deadline=None)
    def test_a_frames_change_squared_is_the_mean_of_its_maps_squares(self, seed, rows):
        shown = rows_of(changed(rows, seed))
        frames, maps = (METRICS[name].compute(shown) for name in FIELDS)
        np.testing.assert_allclose(frames**2, (maps**2).mean(axis=(2, 3)), rtol=1e-12)

    @given(st.floats(-100, 100), st.integers(0, 100))
    @settings(max_examples=20, deadline=None)
    def test_a_change_grows_as_the_difference_does(self, factor, seed):
        shown = rows_of(changed(1, seed))
        further = (shown.clean + factor * (shown.latents.astype(np.float64) - shown.clean)).astype(np.float32)
        for name in FIELDS:
            once, more = (METRICS[name].compute(rows_of(x)) for x in (shown.latents, further))
            np.testing.assert_allclose(more, abs(factor) * once, rtol=1e-3, atol=2e-5 * (1 + abs(factor)))

    @pytest.mark.parametrize("name", FIELDS)
    def test_each_row_is_compared_with_the_run_that_it_changed(self, name):
        shown = rows_of(np.zeros((1, *LATENT)))
        ends = np.stack([shown.clean, shown.corrupted])
        compute = METRICS[name].compute
        assert (compute(rows_of(ends, ("clean", "corrupted"))) == 0).all()
        assert (compute(rows_of(ends, ("corrupted", "clean"))) > 0).all()

    @pytest.mark.parametrize("name", FIELDS)
    def test_a_batch_has_the_very_bits_of_its_rows_alone(self, name):
        latents, recipients = changed(5), ("clean", "corrupted", "clean", "clean", "corrupted")
        together = METRICS[name].compute(rows_of(latents, recipients))
        alone = [METRICS[name].compute(rows_of(latents[i : i + 1], recipients[i : i + 1]))[0] for i in range(5)]
        assert together.tobytes() == np.stack(alone).tobytes()

    @pytest.mark.parametrize("name", FIELDS)
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_row_with_a_non_finite_number_is_nan_whole_and_the_others_keep_their_recipient(self, name, value):
        latents, recipients = changed(3), ("clean", "clean", "corrupted")
        reference = METRICS[name].compute(rows_of(latents, recipients))
        latents[1, 0, 2, 1, 1] = value
        values = METRICS[name].compute(rows_of(latents, recipients))
        assert np.isnan(values[1]).all()
        np.testing.assert_array_equal(values[[0, 2]], reference[[0, 2]])

    @pytest.mark.parametrize("name", FIELDS)
    def test_rows_without_recipients_are_refused(self, name):
        with pytest.raises(ValueError, match=r"2 rows with 0 recipients\. Name the run that each row changed\."):
            METRICS[name].compute(rows_of(changed(2), ()))

    @pytest.mark.parametrize(
        "shape", [(2,), (2, 5), (1, 4), (2, 4, 1)], ids=["number", "other-size", "rows", "too-many"]
    )
    def test_a_field_of_another_shape_is_refused(self, shape):
        about = {"long_name": "b", "description": "b.", "tasks": (), "dims": ("latent_frame",)}
        broken = guarded(Metric(name="broken", compute=lambda given: np.zeros(shape), **about))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"metric 'broken' returned shape .* Return a field of shape \(4,\) a row"):
            broken.compute(rows_of(changed(2)))


class TestAccounts:
    def test_a_cell_with_many_holes_in_its_field_fails_once(self):
        values = {"a": np.zeros((3, 4), np.float32), "b": np.zeros((3, 4, 2, 2), np.float32)}
        values["b"][1, 2, :, 0] = np.nan
        values["b"][1, 3, 0, 0] = np.nan
        values["a"][1, 3] = np.nan
        assert count_failed(values, 2) == 2

    @pytest.mark.parametrize("hole", [False, True], ids=["whole", "hole"])
    def test_an_experiment_without_axes_is_one_cell(self, hole):
        field = np.zeros((2, 2), np.float32)
        field[0, 1] = np.nan if hole else 0
        assert count_failed({"a": np.zeros((), np.float32), "b": field}, 0) == int(hole)

    def test_no_cell_at_all_fails(self):
        assert count_failed({"a": np.zeros((0, 3), np.float32)}, 1) == 0


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small_plan(metrics=["change_map", "goal_evidence", "frame_change"])


@pytest.fixture(scope="module")
def finished(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run.zarr"
    finish(folder, plan)
    return folder


@pytest.fixture
def store(plan: Plan, tmp_path: Path) -> Store:
    return open_or_create(tmp_path / "run.zarr", plan)


AXES = ("step", "layer", "component")


class TestStore:
    @pytest.mark.parametrize(
        ("array", "dims", "shape", "chunks"),
        [
            ("map/change_map", ("sample", *AXES, *FIELD_DIMS), (2, 3, 6, 2, *MAZE), (1, 2, 6, 2, *MAZE)),
            ("map/frame_change", ("sample", *AXES, "latent_frame"), (2, 3, 6, 2, 6), (1, 2, 6, 2, 6)),
            ("map/goal_evidence", ("sample", *AXES), (2, 3, 6, 2), (1, 2, 6, 2)),
            ("one/change_map", ("sample", *FIELD_DIMS), (2, *MAZE), (1, *MAZE)),
            ("baseline/change_map", ("sample", "run", *FIELD_DIMS), (2, 2, *MAZE), (1, 2, *MAZE)),
        ],
        ids=["field", "frames", "number", "field-without-axes", "baseline"],
    )
    def test_a_field_follows_the_axes_and_is_never_cut(self, store, array, dims, shape, chunks):
        found = store.root[array]
        assert found.metadata.dimension_names == dims
        assert (found.shape, found.chunks) == (shape, chunks)

    @pytest.mark.parametrize("group", ["baseline", "map", "one"])
    def test_positions_are_numbered_in_every_group(self, store, group):
        for name, size in zip(FIELD_DIMS, MAZE, strict=True):
            assert store.root[f"{group}/{name}"][:].tolist() == list(range(size))

    def test_only_numbers_are_kept_by_step(self, store):
        assert "goal_evidence_by_step" in store.root["baseline"]
        assert not [name for name in store.root["baseline"] if name.startswith(("change", "frame"))
                    and name.endswith("_by_step")]  # fmt: skip

    def test_without_a_field_the_template_knows_nothing_of_them(self, plan):
        assert not [key for key in template_of(small_plan()) if "latent" in key]

    def test_cost_counts_every_number(self, plan):
        arrays = [a for _, a in zarr.open_group(_template(plan), mode="r").members(max_depth=None)
                  if isinstance(a, zarr.Array) and a.dtype == np.float32]  # fmt: skip
        floor = sum(a.nbytes for a in arrays if a.path.endswith("_floor"))
        previews = 3 * 3 * 6 * 5 * 5 * 3
        assert plan.cost().bytes == sum(a.nbytes for a in arrays) - floor + previews

    def test_units_are_smaller_where_fields_are_large(self, plan):
        @dataclass(frozen=True)
        class Wide:
            size: tuple[int, int, int]

            def latent_shape(self, model: object) -> tuple[int, int, int]:
                return self.size

        def windows(size: tuple[int, int, int], metrics: list[str]) -> list[int]:
            other = replace(small_plan(metrics=metrics), task=Wide(size))  # type: ignore[arg-type]
            return [other.window(grid) for grid in other.grids]

        expected = [plan.window(grid) for grid in plan.grids]
        # A position of the first axis holds 12 cells of the first grid and 6 of the screened one.
        assert windows(MAZE, ["change_map"]) == expected
        assert expected == [2, 1, 3]
        assert windows((16, 128, 170), ["frame_change", "solved"]) == expected
        assert windows((16, 128, 170), ["change_map"]) == [1, 1, 2]
        assert windows((16, 640, 850), ["solved", "change_map"]) == [1, 1, 1]

    def test_a_unit_comes_back_bit_for_bit(self, store):
        values = {"change_map": np.random.default_rng(0).random((2, 6, 2, *MAZE), np.float32)}
        assert store.write_cells("map", values, 1, 0, 2) == values["change_map"].nbytes
        assert store.root["map/change_map"][1, :2].tobytes() == values["change_map"].tobytes()
        assert np.isnan(store.root["map/change_map"][1, 2:]).all()
        assert np.isnan(store.root["map/change_map"][0]).all()

    def test_an_experiment_without_axes_takes_one_field(self, store):
        values = {"change_map": np.random.default_rng(0).random(MAZE, np.float32)}
        store.write_cells("one", values, 1, 0, 1)
        assert store.root["one/change_map"][1].tobytes() == values["change_map"].tobytes()

    @pytest.mark.parametrize(
        ("group", "shape", "window"),
        [
            ("map", (2, 6, 2), (0, 2)),
            ("map", (1, 6, 2, *MAZE), (0, 1)),
            ("one", (), (0, 1)),
            ("one", (1, *MAZE), (0, 1)),
        ],
        ids=["number-for-field", "part-of-a-chunk", "number-without-axes", "row-without-axes"],
    )
    def test_another_shape_is_refused_and_nothing_written(self, store, group, shape, window):
        with pytest.raises(StoreError, match=r"Nothing was written\."):
            store.write_cells(group, {"change_map": np.ones(shape, np.float32)}, 0, *window)
        assert np.isnan(store.root[f"{group}/change_map"][...]).all()

    def test_xarray_opens_it_labelled_and_without_a_warning(self, finished):
        code = f"""
            import xarray
            tree = xarray.open_datatree({str(finished)!r}, engine="zarr")
            chosen = tree["map/change_map"].sel(step=1, layer=2, component="attn2", latent_frame=3)
            assert chosen.dims == ("sample", "latent_y", "latent_x"), chosen.dims
            assert bool(chosen.notnull().all())
        """
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
            capture_output=True, text=True, cwd="/", check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def test_an_export_verifies_as_well(self, finished, tmp_path):
        export_store(finished, tmp_path / "run.zarr.zip")
        assert (tmp_path / "run.zarr.zip").stat().st_size > 10_000


def _template(plan: Plan) -> zarr.storage.MemoryStore:
    from zarr.core.buffer import default_buffer_prototype

    buffer = default_buffer_prototype().buffer
    return zarr.storage.MemoryStore({key: buffer.from_bytes(value) for key, value in template_of(plan).items()})


class TestVerify:
    @pytest.fixture
    def folder(self, finished: Path, tmp_path: Path) -> Path:
        import shutil

        return Path(shutil.copytree(finished, tmp_path / "run.zarr"))

    def test_a_finished_store_is_good(self, folder):
        found = verify(folder)
        assert found.good
        assert found.checked == found.units
        assert found.undigested == 0

    @pytest.mark.parametrize(
        ("array", "at", "unit"),
        [
            ("map/change_map", (1, 2, 5, 1, 5, 9, 9), ("map", 3)),
            ("map/frame_change", (0, 0, 0, 0, 0), ("map", 0)),
            ("one/change_map", (1, 0, 0, 0), ("one", 1)),
            ("baseline/change_map", (1, 1, 5, 9, 9), ("baseline", 1)),
        ],
        ids=["last-position", "frames", "no-axes", "baseline"],
    )
    def test_one_other_number_is_found(self, folder, array, at, unit):
        opened = zarr.open_group(str(folder), mode="r+", use_consolidated=False)[array]
        opened[at] = opened[at] + 1
        (bad,) = verify(folder).bad
        assert (bad.group, bad.index, bad.cause) == (*unit, "not what was written")

    @pytest.mark.parametrize("group", ["map", "one", "baseline", "screened"])
    def test_a_unit_with_holes_is_failed_whatever_else_it_holds(self, group, plan, tmp_path):
        unit = next(u for u in plan.units() if u.group == group)
        store = finish(tmp_path / "run.zarr", plan, holes={unit.id: 1})
        assert store.status(group)[unit.index] == 2
        assert verify(tmp_path / "run.zarr").good
        values = Contents(store, consolidated(store.location)).values(group, unit.index)
        axes = Contents(store, consolidated(store.location)).cell_axes(f"{group}/change_map")
        if group != "screened":
            assert count_failed({k: v for k, v in values.items() if k.startswith(f"{group}/")}, axes) == 1

    def test_cells_and_windows_do_not_count_positions(self, folder, plan):
        store = open_or_create(folder, plan)
        contents = Contents(store, consolidated(store.location))
        assert contents.metrics["map"][0] == "map/change_map"
        assert contents.windows("map") == (2, 2)
        assert contents.windows("one") == (1, 1)
        assert [contents.cell_axes(f"{g}/change_map") for g in ("map", "one", "baseline")] == [3, 0, 1]
        assert math.prod(contents.values("one", 1)["one/change_map"].shape) == math.prod(MAZE)
