"""What the start of Ray took is remembered for the plan."""

from __future__ import annotations

import json

import pytest

from pipeline.start_cost import UNKNOWN_S, remember_start, start_seconds


def test_nothing_is_known_at_first(tmp_path):
    assert start_seconds(tmp_path / "nowhere") == UNKNOWN_S


def test_the_last_start_counts(tmp_path):
    for seconds in (30.0, 12.345):
        remember_start(seconds, tmp_path)
    assert start_seconds(tmp_path) == pytest.approx(12.345, abs=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["ray_start.json"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"seconds": "soon"}', '{"seconds": -1}', '{"seconds": 1e9}', '{"seconds": NaN}', "[" * 99_999],
    ids=["empty", "torn", "list", "word", "before it began", "for ever", "nan", "deep"],
)  # fmt: skip
def test_a_damaged_file_says_nothing(tmp_path, content):
    (tmp_path / "ray_start.json").write_text(content)
    assert start_seconds(tmp_path) == UNKNOWN_S


def test_what_was_written_is_read(tmp_path):
    (tmp_path / "ray_start.json").write_text(json.dumps({"seconds": 12.5}))
    assert start_seconds(tmp_path) == 12.5


def test_a_folder_that_cannot_be_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    remember_start(5.0, tmp_path / "file")
    assert start_seconds(tmp_path / "file") == UNKNOWN_S
