"""The store: created whole or not at all, refused when it is not ours, written in whole chunks, read by anyone."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore

from pipeline.config import SweepConfig
from pipeline.plan import Plan, make_plan
from pipeline.status import summarise
from pipeline.store import (
    DONE,
    FAILED,
    PENDING,
    Journal,
    Lease,
    Store,
    StoreError,
    consolidate,
    differing,
    is_store,
    open_or_create,
    open_store,
)
from pipeline.store import opening as opening_module
from pipeline.store import template as template_module

HERE = platform.node().replace(".", "-")
STEPS, LAYERS = 3, 6


def plan_of(**changes: Any) -> Plan:
    raw = {
        "name": "tiny",
        "model": {"id": "embedded:maze"},
        "task": {"name": "maze", "mazes": 2},
        "sampler": {"steps": STEPS},
        "metrics": ["goal_evidence", "solved"],
        "experiments": {
            "map": {"kind": "patch", "step": "all", "layer": "all", "component": ["attn2", "ffn"]},
            "one": {"kind": "patch", "step": 1, "layer": 2, "direction": "noising"},
            "skip": {"kind": "step_skip", "mode": ["freeze", "drop"], "step": [2, 0]},
        },
        "previews": {"samples": [1], "patched": {"kind": "patch", "step": 1, "layer": 0}},
        "unit_cells": 24,
        **changes,
    }
    return make_plan(SweepConfig.model_validate(raw))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of()


@pytest.fixture
def store(tmp_path: Path, plan: Plan) -> Store:
    return open_or_create(tmp_path / "run.zarr", plan)


def cells(*shape: int, value: float = 1.0) -> dict[str, np.ndarray]:
    return {name: np.full(shape, value, dtype=np.float32) for name in ("goal_evidence", "solved")}


class TestCreate:
    def test_everything_is_allocated_and_pending(self, store, plan):
        assert store.groups() == ["baseline", "map", "one", "skip"]
        for group in store.groups():
            assert store.status(group).tolist() == [PENDING] * plan.group_units(group)
            assert np.isnan(store.root[f"{group}/goal_evidence"][...]).all()

    @pytest.mark.parametrize(
        ("array", "dims", "shape", "chunks"),
        [
            pytest.param(
                "map/solved", ("sample", "step", "layer", "component"), (2, 3, 6, 2), (1, 2, 6, 2), id="experiment"
            ),
            pytest.param("one/solved", ("sample",), (2,), (1,), id="experiment-without-axes"),
            pytest.param("skip/solved", ("sample", "step", "mode"), (2, 2, 2), (1, 2, 2), id="step-leads"),
            pytest.param("baseline/solved", ("sample", "run"), (2, 2), (1, 2), id="baseline"),
            pytest.param(
                "baseline/solved_by_step", ("sample", "run", "step"), (2, 2, 3), (1, 2, 3), id="baseline-by-step"
            ),
            pytest.param(
                "previews/x0_hat",
                ("preview", "run", "step", "frame", "y", "x", "rgb"),
                (1, 3, 3, 6, 5, 5, 3),
                (1, 3, 3, 6, 5, 5, 3),
                id="previews",
            ),
            pytest.param("map/status", ("unit",), (4,), (4,), id="status"),
        ],
    )
    def test_array_has_the_contracted_layout(self, store, array, dims, shape, chunks):
        found = store.root[array]
        assert found.metadata.dimension_names == dims
        assert (found.shape, found.chunks) == (shape, chunks)

    def test_a_unit_is_whole_chunks(self, store, plan):
        for unit in plan.units():
            if unit.group == "baseline" or not plan.by_name[unit.group].shape:
                continue
            width = store.root[f"{unit.group}/solved"].chunks[1]
            assert unit.start % width == 0
            assert unit.stop == min(unit.start + width, plan.by_name[unit.group].shape[0])

    @pytest.mark.parametrize(
        ("coordinate", "values"),
        [
            pytest.param("map/layer", list(range(LAYERS)), id="open-range"),
            pytest.param("map/component", ["attn2", "ffn"], id="words"),
            pytest.param("skip/step", [2, 0], id="order-of-the-list"),
            pytest.param("baseline/run", ["clean", "corrupted"], id="runs"),
            pytest.param("previews/run", ["clean", "corrupted", "patched"], id="preview-runs"),
            pytest.param("previews/preview", [1], id="preview-is-a-sample-index"),
            pytest.param("samples/prompt", ["maze-00000", "maze-00001"], id="prompts"),
            pytest.param("samples/pair", ["red/blue", "red/blue"], id="pairs"),
        ],
    )
    def test_coordinate_holds_the_values(self, store, coordinate, values):
        assert list(store.root[coordinate][:]) == values

    def test_sigma_goes_with_its_step(self, store):
        sigmas = store.root["baseline/sigma"][:]
        assert (np.diff(sigmas) < 0).all(), "noise falls from step to step"
        np.testing.assert_array_equal(store.root["skip/sigma"][:], [sigmas[2], sigmas[0]])

    def test_attributes_say_where_it_comes_from(self, store, plan):
        attrs = dict(store.root.attrs)
        assert attrs["schema_version"] == 2
        assert attrs["config_sha256"] == plan.config.hash() == store.config_hash
        assert json.loads(attrs["config_json"]) == plan.config.identity()
        assert json.loads(attrs["model"])["fingerprint"] == plan.model.fingerprint
        assert {"zarr", "torch", "diffusers"} <= json.loads(attrs["libraries"]).keys()
        assert attrs["experimental_unit"] == "prompt"

    @pytest.mark.parametrize(
        ("group", "kind", "contrast", "recipient", "fixed"),
        [
            pytest.param("map", "patch", "true", "corrupted", {}, id="map"),
            pytest.param(
                "one", "patch", "true", "clean", {"step": 1, "layer": 2, "direction": "noising"}, id="fixed-fields"
            ),
            pytest.param("skip", "step_skip", "false", "clean", {}, id="no-contrast"),
        ],
    )
    def test_experiment_attributes_say_what_was_done(self, store, group, kind, contrast, recipient, fixed):
        attrs = store.root[group].attrs
        assert (attrs["kind"], attrs["contrast"], attrs["recipient"]) == (kind, contrast, recipient)
        assert json.loads(attrs["fixed"]) == fixed
        assert attrs["formula"]

    def test_recipient_of_swept_directions_is_by_direction(self, tmp_path):
        swept = {"map": {"kind": "patch", "step": 0, "layer": 0, "direction": ["denoising", "self"]}}
        made = open_or_create(tmp_path / "run.zarr", plan_of(experiments=swept))
        assert made.root["map"].attrs["recipient"] == "by direction"

    def test_no_previews_is_no_group(self, tmp_path):
        made = open_or_create(tmp_path / "run.zarr", plan_of(previews={"samples": []}))
        assert "previews" not in made.root

    def test_parents_are_made(self, tmp_path, plan):
        assert is_store(open_or_create(tmp_path / "a" / "b" / "run.zarr", plan).location)

    def test_empty_folder_becomes_the_store(self, tmp_path, plan):
        (tmp_path / "run.zarr").mkdir()
        open_or_create(tmp_path / "run.zarr", plan)
        assert [p.name for p in tmp_path.iterdir()] == ["run.zarr"]

    @pytest.mark.parametrize(
        "failure", [OSError(28, "No space left on device"), RuntimeError("a bug"), KeyboardInterrupt()], ids=repr
    )
    def test_failed_creation_leaves_nothing(self, tmp_path, plan, monkeypatch, failure):
        def fail(*args: Any) -> None:
            raise failure

        monkeypatch.setattr(template_module, "_create_experiment", fail)
        with pytest.raises(StoreError if isinstance(failure, OSError) else type(failure)):
            open_or_create(tmp_path / "run.zarr", plan)
        assert list(tmp_path.iterdir()) == []

    def test_full_disk_is_one_sentence(self, tmp_path, plan, monkeypatch):
        def fail(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(template_module, "_write_samples", fail)
        with pytest.raises(
            StoreError,
            match=r"^cannot create store .*run\.zarr: No space left on device\. Choose a writable --store\.$",
        ):
            open_or_create(tmp_path / "run.zarr", plan)

    def test_rest_of_a_killed_creation_is_replaced(self, tmp_path, plan):
        ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
        rest = tmp_path / f"run.zarr.{HERE}.{int(ended.stdout)}.building"
        rest.mkdir()
        (rest / "zarr.json").write_text("{}")
        open_or_create(tmp_path / "run.zarr", plan)
        assert [p.name for p in tmp_path.iterdir()] == ["run.zarr"]

    def test_creation_of_a_living_process_is_left_alone(self, tmp_path, plan):
        other = tmp_path / f"run.zarr.{HERE}.{os.getppid()}.building"
        other.mkdir()
        open_or_create(tmp_path / "run.zarr", plan)
        assert other.exists()

    def test_creation_on_another_machine_is_left_alone(self, tmp_path, plan):
        ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
        other = tmp_path / f"run.zarr.another-{HERE}.{int(ended.stdout)}.building"
        other.mkdir()
        open_or_create(tmp_path / "run.zarr", plan)
        assert other.exists()

    def test_a_faster_first_start_of_the_same_config_is_joined(self, tmp_path, plan, monkeypatch):
        write = opening_module.write_template

        def slow(store, plan):
            write(store, plan)
            write(LocalStore(tmp_path / "run.zarr"), plan)

        monkeypatch.setattr(opening_module, "write_template", slow)
        store = open_or_create(tmp_path / "run.zarr", plan)
        assert store.config_hash == plan.config.hash()
        assert [p.name for p in tmp_path.iterdir()] == ["run.zarr"]


class TestOpen:
    def test_same_config_opens_with_its_data(self, store, plan):
        store.write_cells("map", cells(2, LAYERS, 2, value=0.5), 0, 0, 2)
        again = open_or_create(store.location.path, plan)
        assert (again.root["map/solved"][0, :2] == 0.5).all()

    def test_settings_of_the_run_may_change(self, store):
        assert open_or_create(store.location.path, plan_of(run={"replicas": 0})).config_hash == store.config_hash

    def test_other_config_is_refused_with_the_keys_that_differ(self, store):
        other = plan_of(task={"name": "maze", "mazes": 3}, unit_cells=7)
        with pytest.raises(StoreError) as caught:
            open_or_create(store.location.path, other)
        assert str(caught.value) == (
            f"store {store.location} holds another config. Differing: task.mazes is 2 in the store, 3 in the config; "
            "unit_cells is 24 in the store, 7 in the config. Use another --store, or that config."
        )

    def test_other_weights_are_refused(self, store, plan):
        store.root.attrs["model_digest"] = "0" * 64
        with pytest.raises(
            StoreError, match=r"computed with other weights or settings of embedded:maze\. Use another --store\.$"
        ):
            open_or_create(store.location.path, plan)

    def test_newer_schema_is_refused(self, store):
        store.root.attrs["schema_version"] = 99
        with pytest.raises(StoreError, match=r"has schema version 99, this stepscope reads up to 2\. Update it\.$"):
            open_store(store.location.path)

    def test_older_schema_is_read_but_not_continued(self, store, plan):
        store.root.attrs["schema_version"] = 1
        assert open_store(store.location.path).config_hash == plan.config.hash()
        with pytest.raises(StoreError, match=r"was begun with schema version 1, this stepscope writes 2\. Finish it"):
            open_or_create(store.location.path, plan)


def make_missing(path: Path) -> None:
    pass


def make_file(path: Path) -> None:
    path.write_text("hello")


def make_filled_folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("hello")


def make_foreign_zarr(path: Path) -> None:
    zarr.create_group(str(path)).create_array("x", shape=(1,), dtype="int8")


def make_json_list(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_text("[]")


def make_half_json(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_text('{"attributes": {')


def make_word_attributes(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_text('{"attributes": "config_sha256 schema_version"}')


def make_loop(path: Path) -> None:
    path.symlink_to(path)


NOT_STORES = [
    pytest.param(make_file, id="file"),
    pytest.param(make_filled_folder, id="folder-with-files"),
    pytest.param(make_foreign_zarr, id="zarr-of-others"),
    pytest.param(make_json_list, id="json-list"),
    pytest.param(make_half_json, id="half-json"),
    pytest.param(make_word_attributes, id="attributes-are-a-word"),
]


class TestNotAStore:
    @pytest.mark.parametrize("make", NOT_STORES)
    def test_is_not_opened(self, tmp_path, make):
        path = tmp_path / "run.zarr"
        make(path)
        assert not is_store(path)
        with pytest.raises(
            StoreError, match=r"run\.zarr is not a stepscope store\. Create one with: stepscope run CONFIG"
        ):
            open_store(path)

    @pytest.mark.parametrize("make", NOT_STORES)
    def test_is_not_overwritten(self, tmp_path, plan, make):
        path = tmp_path / "run.zarr"
        make(path)
        before = sorted(p.name for p in tmp_path.rglob("*"))
        with pytest.raises(StoreError, match=r"run\.zarr exists and is not a stepscope store\. Use another --store\.$"):
            open_or_create(path, plan)
        assert sorted(p.name for p in tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(
        "make", [pytest.param(make_missing, id="missing"), pytest.param(make_loop, id="link-to-itself")]
    )
    def test_that_is_not_there_does_not_exist(self, tmp_path, make):
        make(tmp_path / "run.zarr")
        with pytest.raises(StoreError, match=r"run\.zarr does not exist\. Create one with"):
            open_store(tmp_path / "run.zarr")

    @pytest.mark.parametrize(
        ("below", "reason"),
        [
            pytest.param("file/run.zarr", "File exists|Not a directory", id="parent-is-a-file"),
            pytest.param("file/a/b/run.zarr", "Not a directory", id="grandparent-is-a-file"),
            pytest.param("n" * 300, "File name too long", id="long-name"),
            pytest.param("/proc/nowhere/run.zarr", "No such file or directory", id="pseudo-file-system"),
        ],
    )
    def test_place_that_cannot_be_written_is_one_sentence(self, tmp_path, plan, below, reason):
        (tmp_path / "file").write_text("hello")
        with pytest.raises(StoreError, match=rf"^cannot create store .*: ({reason})\. Choose a writable --store\.$"):
            open_or_create(tmp_path / below, plan)
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_folder_without_permission_is_one_sentence(self, tmp_path, plan):
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(StoreError, match=r"Permission denied\. Choose a writable --store\.$"):
                open_or_create(tmp_path / "run.zarr", plan)
        finally:
            tmp_path.chmod(0o700)

    def test_folder_that_may_not_be_listed_is_one_sentence(self, tmp_path, plan, monkeypatch):
        def denied(self: Path) -> Any:
            raise PermissionError(13, "Permission denied")

        (tmp_path / "run.zarr").mkdir()
        monkeypatch.setattr(Path, "iterdir", denied)
        with pytest.raises(
            StoreError, match=r"^cannot create store .*: Permission denied\. Choose a writable --store\.$"
        ):
            open_or_create(tmp_path / "run.zarr", plan)

    @pytest.mark.parametrize("name", [".", "..", "/"])
    def test_path_without_a_name_is_refused(self, tmp_path, plan, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(StoreError, match=r"has no name of its own\. Name a new folder with --store\.$"):
            open_or_create(Path(name), plan)


class TestRegions:
    def test_unit_is_written_and_nothing_else(self, store):
        assert store.write_cells("map", cells(2, LAYERS, 2), 1, 0, 2) == 2 * 4 * 2 * LAYERS * 2
        values = store.root["map/solved"][...]
        assert (values[1, :2] == 1).all()
        assert np.isnan(values[0]).all()
        assert np.isnan(values[1, 2:]).all()

    def test_last_window_may_be_short(self, store):
        store.write_cells("map", cells(1, LAYERS, 2), 0, 2, 3)
        assert (store.root["map/solved"][0, 2] == 1).all()

    def test_experiment_without_axes_takes_one_number(self, store):
        store.write_cells("one", cells(), 1, 0, 1)
        np.testing.assert_array_equal(store.root["one/solved"][:], [np.nan, 1])

    def test_not_a_number_is_stored_and_read(self, store):
        values = cells(2, LAYERS, 2)
        values["solved"][0, 3, 1] = np.nan
        store.write_cells("map", values, 0, 0, 2)
        read = Store(store.location.path).root["map/solved"][0, :2]
        assert np.argwhere(np.isnan(read)).tolist() == [[0, 3, 1]]

    def test_chunk_of_not_a_number_is_a_file(self, store):
        """A failed cell must be told from one that was never computed by looking at the files."""
        store.write_cells("map", cells(2, LAYERS, 2, value=np.nan), 0, 0, 2)
        assert (store.location.path / "map/solved/c/0/0/0/0").exists()

    @pytest.mark.parametrize(
        ("shape", "start", "stop", "message"),
        [
            pytest.param(
                (2, LAYERS),
                0,
                2,
                r"map/goal_evidence\[0, 0:2\] has shape \(2, 6, 2\), the values have \(2, 6\)",
                id="missing-axis",
            ),
            pytest.param(
                (2, 2, LAYERS), 0, 2, r"has shape \(2, 6, 2\), the values have \(2, 2, 6\)", id="axes-exchanged"
            ),
            pytest.param((1, LAYERS, 2), 0, 2, r"has shape \(2, 6, 2\), the values have \(1, 6, 2\)", id="too-few"),
            pytest.param(
                (1, LAYERS, 2), 0, 1, r"map/goal_evidence\[0, 0:1\] is not whole chunks of 2", id="half-a-chunk"
            ),
            pytest.param(
                (2, LAYERS, 2), 1, 3, r"map/goal_evidence\[0, 1:3\] is not whole chunks of 2", id="across-chunks"
            ),
            pytest.param((2, LAYERS, 2), 2, 4, r"map/goal_evidence\[0, 2:4\] is not inside 0:3", id="beyond-the-axis"),
            pytest.param((0, LAYERS, 2), 2, 2, r"map/goal_evidence\[0, 2:2\] is not inside 0:3", id="empty"),
        ],
    )
    def test_wrong_region_is_refused_by_name(self, store, shape, start, stop, message):
        with pytest.raises(StoreError, match=rf"^region .*{message}.*\. Nothing was written\.$"):
            store.write_cells("map", cells(*shape), 0, start, stop)
        assert np.isnan(store.root["map/goal_evidence"][...]).all()

    def test_refused_second_metric_leaves_the_first_unwritten(self, store):
        values = {**cells(2, LAYERS, 2), "solved": np.zeros((2, 1, 1), dtype=np.float32)}
        with pytest.raises(StoreError, match=r"map/solved.*Nothing was written"):
            store.write_cells("map", values, 0, 0, 2)
        assert np.isnan(store.root["map/goal_evidence"][...]).all()

    def test_sample_is_written_whole(self, store):
        values = {"solved": np.array([1, 0], np.float32), "solved_by_step": np.zeros((2, STEPS), np.float32)}
        assert store.write_sample("baseline", values, 1) == 4 * (2 + 2 * STEPS)
        np.testing.assert_array_equal(store.root["baseline/solved"][...], [[np.nan, np.nan], [1, 0]])

    def test_sample_of_the_wrong_shape_is_refused_and_nothing_written(self, store):
        values = {"solved": np.array([1, 0], np.float32), "solved_by_step": np.zeros((STEPS, 2), np.float32)}
        with pytest.raises(
            StoreError, match=r"baseline/solved_by_step\[0\] has shape \(2, 3\), the values have \(3, 2\)"
        ):
            store.write_sample("baseline", values, 0)
        assert np.isnan(store.root["baseline/solved"][...]).all()

    @pytest.mark.parametrize("position", [0.1, 0.5, 0.9], ids=["early", "middle", "late"])
    def test_flipped_byte_is_noticed(self, store, position):
        rng = np.random.default_rng(3)
        noise = {"solved": rng.standard_normal((2, LAYERS, 2)).astype(np.float32)}
        store.write_cells("map", noise, 0, 0, 2)
        file = store.location.path / "map/solved/c/0/0/0/0"
        data = bytearray(file.read_bytes())
        data[int(position * len(data))] ^= 0xFF
        file.write_bytes(data)
        with pytest.raises(Exception, match=r"(?i)zstd|checksum|corrupt|restored data"):
            Store(store.location.path).root["map/solved"][0, :2]


class TestStatus:
    def test_is_written_by_the_driver_and_read_back(self, store):
        store.write_status("map", np.array([DONE, FAILED, PENDING, DONE], np.uint8))
        assert Store(store.location.path).status("map").tolist() == [1, 2, 0, 1]

    def test_summary_counts_every_group(self, store):
        store.write_status("map", np.array([DONE, FAILED, PENDING, DONE], np.uint8))
        rows = {row["group"]: row for row in summarise(store.location.path)}
        assert rows["map"] == {"group": "map", "units": 4, "done": 2, "pending": 1, "failed": 1}
        assert rows["baseline"] == {"group": "baseline", "units": 2, "done": 0, "pending": 2, "failed": 0}

    def test_summary_counts_what_only_the_journal_knows(self, store):
        journal = Journal(store.location.path)
        journal.append(unit=1, group="map", index=0, failed=0)
        journal.append(unit=2, group="map", index=1, failed=3)
        journal.append(unit=3, group="map", index=2, error="boom")
        journal.append(unit=4, replica=0, retried="boom")
        journal.append(unit=5, group="gone", index=0)
        (row,) = (row for row in summarise(store.location.path) if row["group"] == "map")
        assert (row["done"], row["failed"], row["pending"]) == (1, 2, 1)

    def test_last_word_of_the_journal_counts(self, store):
        journal = Journal(store.location.path)
        journal.append(unit=1, group="map", index=0, error="boom")
        journal.append(unit=1, group="map", index=0, failed=0)
        (row,) = (row for row in summarise(store.location.path) if row["group"] == "map")
        assert (row["done"], row["failed"]) == (1, 0)

    def test_temporary_files_of_killed_writers_are_deleted(self, store):
        for name in ("map/solved/c/0/0.123.partial", "x.partial"):
            (store.location.path / name).parent.mkdir(parents=True, exist_ok=True)
            (store.location.path / name).write_text("half")
        assert store.sweep_partial_files() == 2
        assert list(store.location.path.rglob("*.partial")) == []
        assert store.sweep_partial_files() == 0


class TestDiffering:
    @pytest.mark.parametrize(
        ("a", "b", "lines"),
        [
            pytest.param({"a": 1}, {"a": 1}, [], id="equal"),
            pytest.param({"a": 1}, {"a": 2}, ["a is 1 in the store, 2 in the config"], id="value"),
            pytest.param(
                {"a": {"b": 1}}, {"a": {"b": None}}, ["a.b is 1 in the store, null in the config"], id="nested"
            ),
            pytest.param({}, {"a": "x"}, ['a is null in the store, "x" in the config'], id="missing"),
            pytest.param({"a": [1]}, {"a": [1, 2]}, ["a is [1] in the store, [1, 2] in the config"], id="list"),
            pytest.param(
                {"b": 1, "a": 1},
                {"a": 2, "b": 2},
                ["a is 1 in the store, 2 in the config", "b is 1 in the store, 2 in the config"],
                id="sorted",
            ),
        ],
    )
    def test_keys_are_listed_with_both_values(self, a, b, lines):
        assert differing(a, b) == lines


def test_opens_with_xarray_alone_and_without_a_warning(store):
    store.write_cells("map", cells(2, LAYERS, 2, value=0.25), 0, 0, 2)
    Journal(store.location.path).append(unit=1, group="map", index=0, failed=0)
    lease = Lease(store.location)
    lease.acquire()
    lease.release()
    consolidate(store.location)
    code = f"""
        import sys
        import xarray as xr
        import zarr
        tree = xr.open_datatree({str(store.location.path)!r}, engine="zarr")
        assert sorted(tree.children) == ["baseline", "map", "one", "previews", "samples", "skip"], tree.children
        cube = tree["map"].dataset["solved"]
        assert cube.dims == ("sample", "step", "layer", "component")
        assert float(cube.sel(component="ffn").isel(sample=0, step=1, layer=5)) == 0.25
        assert "sigma" in tree["map"].dataset.coords
        assert cube.attrs["long_name"] and cube.attrs["units"] == "1" and cube.attrs["description"]
        assert tree.attrs["schema_version"] == 2
        assert not {{"torch", "pipeline", "interventions", "ray"}} & set(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
