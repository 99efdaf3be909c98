"""What the start of Ray took is remembered for the plan."""

from __future__ import annotations

import json

import pytest

from pipeline.start_cost import UNKNOWN_S, start_seconds, timed_start


def test_nothing_is_known_at_first(tmp_path):
    assert start_seconds(tmp_path / "nowhere") == UNKNOWN_S


def test_the_last_start_counts(tmp_path):
    for _ in range(2):
        with timed_start(tmp_path):
            pass
    assert 0 <= start_seconds(tmp_path) < UNKNOWN_S
    assert [path.name for path in tmp_path.iterdir()] == ["ray_start.json"]


def test_a_start_that_fails_is_not_remembered(tmp_path):
    with pytest.raises(RuntimeError), timed_start(tmp_path):
        raise RuntimeError("no Ray")
    assert start_seconds(tmp_path) == UNKNOWN_S


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
    with timed_start(tmp_path / "file"):
        pass
    assert start_seconds(tmp_path / "file") == UNKNOWN_S
