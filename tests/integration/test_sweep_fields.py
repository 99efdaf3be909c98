"""A real sweep with metrics that are a field: whole, equal to plain hooks, and no other number moved by them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from pipeline.cli import main
from pipeline.store import DONE, Journal, open_store, verify
from pipeline.sweep import run_sweep
from tests.reference.recompute import TOLERANCE, plan_of, worst_differences
from tests.sweep_fixture import arrays, save_tiny_model, tiny_config, write_config

FIELDS = ("change_map", "frame_change")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    found = tmp_path_factory.mktemp("fields")
    save_tiny_model(found / "tiny")
    return found


def run(folder: Path, name: str, metrics: list[str]) -> Path:
    config = write_config(folder / f"{name}.yaml", tiny_config(folder / "tiny", metrics=metrics))
    assert main(["run", str(config), "--store", str(folder / f"{name}.zarr")]) == 0
    return folder / f"{name}.zarr"


@pytest.fixture(scope="module")
def plain(folder):
    return run(folder, "plain", ["goal_evidence", "latent_distance"])


@pytest.fixture(scope="module")
def store(folder):
    return run(folder, "fields", ["change_map", "goal_evidence", "latent_distance", "frame_change"])


def test_every_unit_is_done_and_as_it_was_written(store):
    opened = open_store(store)
    assert all((opened.status(group) == DONE).all() for group in opened.groups())
    for name, value in arrays(store).items():
        if value.dtype.kind == "f":
            assert np.isfinite(value).all(), name
    assert verify(store).good


def test_numbers_are_those_of_the_sweep_without_fields(plain, store):
    without, found = arrays(plain), arrays(store)
    assert {n.rpartition("/")[2] for n in found.keys() - without.keys()} <= {
        *FIELDS, "latent_frame", "latent_y", "latent_x",
    }  # fmt: skip
    for name, value in without.items():
        if value.dtype.kind == "f":
            assert value.tobytes() == found[name].tobytes(), name


def test_random_cells_agree_with_plain_hooks_at_every_position(store):
    rows = worst_differences(open_store(store), cells=8, seed=4)
    assert max(worst for _, _, worst in rows) < TOLERANCE


def test_a_frames_change_is_that_of_its_positions(store):
    root = zarr.open_group(str(store), mode="r")
    for group in ("patch_map", "skip", "noise_frame"):
        maps, frames = (np.asarray(root[f"{group}/{name}"], dtype=np.float64) for name in FIELDS)
        np.testing.assert_allclose(np.sqrt((maps**2).mean(axis=(-1, -2))), frames, rtol=1e-5, atol=1e-6)


def test_change_is_from_the_run_that_a_cell_changes(store):
    root = zarr.open_group(str(store), mode="r")
    assert (np.asarray(root["baseline/change_map"]) == 0).all(), "a recorded run is its own recipient"
    directions = list(root["patch_map/direction"][:])
    axis = root["patch_map/change_map"].metadata.dimension_names.index("direction")
    change = np.moveaxis(np.asarray(root["patch_map/change_map"]), axis, 0)
    assert change[directions.index("self")].max() < 1e-5
    assert change[directions.index("denoising")].max() > 1e-3
    assert np.asarray(root["noise_step/frame_change"])[..., 1:].min() > 1e-3


def test_the_given_frame_never_changes(store):
    root = zarr.open_group(str(store), mode="r")
    for group in ("patch_map", "skip", "reuse", "noise_step"):
        assert np.asarray(root[f"{group}/change_map"])[..., 0, :, :].max() < 1e-5, group


def test_receipts_count_cells_and_bytes_of_fields(store):
    plan = plan_of(open_store(store))
    entries = [e for e in Journal(store).entries() if e.get("group") == "skip"]
    assert entries
    assert {e["failed"] for e in entries} == {0}
    size = sum(int(np.prod(plan.field_shape(m))) for m in plan.metrics)
    assert sum(e["bytes"] for e in entries) == 4 * size * sum(e["cells"] for e in entries)


def test_a_lost_field_chunk_is_computed_again_to_the_same_bits(store):
    before = arrays(store)
    chunk = next(iter(sorted((store / "skip" / "change_map" / "c").rglob("*"), key=lambda p: (p.is_dir(), str(p)))))
    chunk.unlink()
    assert [unit.cause for unit in verify(store).bad] == ["missing"]
    result = run_sweep(plan_of(open_store(store)), store)
    assert result.computed == 1
    assert verify(store).good
    after = arrays(store)
    assert after["skip/change_map"].tobytes() == before["skip/change_map"].tobytes()


def test_commands_read_it_to_the_end(store, tmp_path, capsys):
    assert main(["effects", str(store), "--replicates", "20"]) == 0
    assert main(["report", str(store), "--out", str(tmp_path / "report")]) == 0
    assert main(["status", str(store)]) == 0
    assert main(["verify", str(store)]) == 0
    assert main(["export", str(store), str(tmp_path / "copy.zarr.zip")]) == 0
    effects = zarr.open_group(str(store), mode="r")["effects/skip/frame_change_difference"]
    expected = np.asarray(zarr.open_group(str(store), mode="r")["skip/frame_change"]).mean(axis=0)
    np.testing.assert_allclose(np.asarray(effects)[0], expected, rtol=1e-5, atol=1e-7)


def test_the_config_says_only_the_names(store):
    config = json.loads(open_store(store).root.attrs["config_json"])
    assert config["metrics"] == ["change_map", "goal_evidence", "latent_distance", "frame_change"]
