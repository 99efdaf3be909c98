"""What was measured is found again where everything is the same, and never where anything is not."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest

from pipeline.config import SweepConfig
from pipeline.plan import make_plan
from pipeline.rows import Measured, Table
from pipeline.rows_cache import RowsCache, about, cache_folder

BATCHES = Measured(rows=1, seconds=0.5, peak=900), Measured(rows=2, seconds=0.7, peak=1100)
TABLE = Table(bare_peak=1000, batches=BATCHES, whole=True)
KNOWN = {"model": "abc", "threads": 1, "calls": [["cond"]]}


class TestFile:
    def test_what_was_written_is_read(self, tmp_path):
        RowsCache(KNOWN, tmp_path).write(TABLE)
        assert RowsCache(copy.deepcopy(KNOWN), tmp_path).read() == TABLE

    def test_nothing_is_known_before(self, tmp_path):
        assert RowsCache(KNOWN, tmp_path / "nowhere").read() is None

    @pytest.mark.parametrize("change", [{"threads": 2}, {"model": "abd"}, {"calls": [["cond", "uncond"]]}, {"new": 1}])
    def test_what_is_known_of_another_does_not_count(self, tmp_path, change):
        RowsCache(KNOWN, tmp_path).write(TABLE)
        assert RowsCache({**KNOWN, **change}, tmp_path).read() is None

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: "",
            lambda text: text[:-20],
            lambda text: text.replace("0.5", "-0.5"),
            lambda text: text.replace("abc", "xyz"),
            lambda text: "[]",
            lambda text: "[" * 100_000,
            lambda text: text.replace('"table"', '"chair"'),
            lambda text: "\udcff",
        ],
        ids=["empty", "torn", "nonsense", "of another", "a list", "too deep", "no table", "not utf-8"],
    )
    def test_a_damaged_file_is_as_if_there_were_none(self, tmp_path, damage):
        cache = RowsCache(KNOWN, tmp_path)
        cache.write(TABLE)
        cache.file.write_bytes(damage(cache.file.read_text()).encode(errors="surrogateescape"))
        assert cache.read() is None
        cache.write(TABLE)
        assert cache.read() == TABLE

    def test_nothing_else_is_left_beside_it(self, tmp_path):
        cache = RowsCache(KNOWN, tmp_path)
        cache.write(TABLE)
        cache.write(TABLE)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [cache.file]

    def test_a_write_that_fails_leaves_the_old_one(self, tmp_path, monkeypatch):
        cache = RowsCache(KNOWN, tmp_path)
        cache.write(TABLE)
        content = cache.file.read_bytes()

        def full(source, target):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        cache.write(Table(bare_peak=1, batches=TABLE.batches, whole=True))
        assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [content]

    def test_a_folder_that_cannot_be_is_no_error(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        cache = RowsCache(KNOWN, tmp_path / "file")
        cache.write(TABLE)
        assert cache.read() is None


class TestFolder:
    @pytest.mark.parametrize(
        ("given", "home", "expected"),
        [
            ("/some/cache", "/home/me", "/some/cache/stepscope"),
            ("", "/home/me", "/home/me/.cache/stepscope"),
            ("relative", "/home/me", "/home/me/.cache/stepscope"),
        ],
        ids=["given", "not given", "not absolute"],
    )
    def test_is_that_of_the_user(self, given, home, expected, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        monkeypatch.setenv("HOME", home)
        assert cache_folder() == Path(expected)

    def test_without_a_home_nothing_is_kept(self, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        cache = RowsCache(KNOWN)
        cache.write(TABLE)
        assert cache.read() is None


def known_of(hardware="a machine", **changes):
    raw = {
        "name": "cache",
        "model": {"id": "embedded:maze"},
        "task": {"name": "maze", "mazes": 1},
        "sampler": {"steps": 3},
        "metrics": ["goal_evidence"],
        "experiments": {"map": {"kind": "patch", "step": "all", "layer": [0]}},
        **changes,
    }
    return about(make_plan(SweepConfig.model_validate(raw)), hardware)


class TestWhatItDependsOn:
    @pytest.mark.parametrize(
        "changes",
        [
            {"model": {"id": "embedded:maze", "dtype": "bfloat16"}},
            {"sampler": {"steps": 3, "guidance_scale": 2.0}},
            {"engine": {"threads": 2}},
            {"metrics": ["latent_distance"]},
            {"hardware": "another machine"},
        ],
        ids=["dtype", "guidance", "threads", "metrics", "hardware"],
    )
    def test_changes_with(self, changes):
        assert known_of(**changes) != known_of()

    @pytest.mark.parametrize(
        "changes",
        [
            {"name": "another"},
            {"sampler": {"steps": 4}},
            {"task": {"name": "maze", "mazes": 7}},
            {"experiments": {"skip": {"kind": "step_skip", "mode": "drop", "step": 1}}},
            {"engine": {"batch_rows": "auto"}},
            {"run": {"replicas": 7}},
        ],
        ids=["name", "steps", "samples", "experiments", "rows", "replicas"],
    )
    def test_is_the_same_whatever(self, changes):
        assert known_of(**changes) == known_of()

    def test_is_plain_data_that_names_libraries(self):
        known = known_of()
        assert json.loads(json.dumps(known)) == known
        assert {"torch", "diffusers", "nnsight"} <= set(known["libraries"])
