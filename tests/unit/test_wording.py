"""What a user wrote is quoted on one line, shortened, and never acts on a terminal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.wording import LONGEST, named, plain, shortened, shown

ANYTHING = st.text(st.characters(), max_size=400)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        pytest.param("step", "step", id="word"),
        pytest.param("Grüße, 日本", "Grüße, 日本", id="letters-of-any-script"),
        pytest.param("a\x1b[2Jb", r"a\x1b[2Jb", id="clears-the-screen"),
        pytest.param("a\u202eb", r"a\u202eb", id="turns-text-round"),
        pytest.param("a\nb", r"a\nb", id="line-break"),
        pytest.param("a\u2028b", r"a\u2028b", id="line-separator"),
        pytest.param("\ud800", r"\ud800", id="lone-surrogate"),
        pytest.param("a\x00b", r"a\x00b", id="nul"),
    ],
)
def test_what_acts_on_a_terminal_is_escaped(text, written):
    assert plain(text) == written


def test_lines_can_be_kept():
    assert plain("a\nb\x07", lines=True) == "a\nb\\x07"


@given(ANYTHING)
def test_plain_text_can_be_written_anywhere(text):
    written = plain(text)
    written.encode()
    assert len(written.splitlines()) <= 1
    assert all(unicodedata.category(ch) not in ("Cc", "Cf", "Cs") for ch in written)
    assert plain(written) == written


@given(st.one_of(ANYTHING, st.integers(), st.lists(st.integers(), max_size=200), st.floats()))
def test_a_value_is_one_short_line(value):
    assert 0 < len(shown(value)) <= LONGEST
    assert "\n" not in shown(value)


@given(ANYTHING, st.integers(8, 100))
def test_shortened_keeps_both_ends(text, most):
    short = shortened(text, most)
    assert len(short) <= most
    assert text.startswith(short[: most // 2])
    assert text == short or text.endswith(short[-(most // 2 - 3) :])


def test_short_values_are_as_python_writes_them():
    assert shown({"a": [1, "b"]}) == "{'a': [1, 'b']}"
    assert named("experiments", "map", 3) == "experiments.map.3"


def test_a_value_without_end_is_shown():
    value: list = []
    for _ in range(5000):
        value = [value]
    assert 0 < len(shown(value)) <= LONGEST
