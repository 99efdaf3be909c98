"""Causes: what is one and the same, what is not, and that no text can do harm."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.causes import MOST_CAUSES, OTHERS, Causes, cause_of, clean

ACTOR = "5f8a0c1b2d3e4f5061728394a5b6c7d8"


class TestOneCause:
    @pytest.mark.parametrize(
        ("errors", "cause"),
        [
            pytest.param(
                ["ValueError: index 3 is out of range", "ValueError: index 41 is out of range"],
                "ValueError: index <n> is out of range",
                id="whole-numbers",
            ),
            pytest.param(
                ["OOM: tried to allocate 1.50 GiB", "OOM: tried to allocate -2e+3 GiB"],
                "OOM: tried to allocate <n> GiB",
                id="fractions-signs-exponents",
            ),
            pytest.param(
                ["OSError: cannot read /data/a/1.png", "OSError: cannot read ../other/b.png"],
                "OSError: cannot read <path>",
                id="paths",
            ),
            pytest.param(
                ["KeyError: 'blocks/3/attn'", "KeyError: 'blocks/4/attn'"], "KeyError: '<path>'", id="relative-path"
            ),
            pytest.param(
                ["Timeout: s3://bucket/a?x=1 is slow", "Timeout: http://10.0.0.1:9000/b is slow"],
                "Timeout: <path> is slow",
                id="urls",
            ),
            pytest.param(
                [f"ActorDiedError: actor {ACTOR} died", "ActorDiedError: actor 0123456789abcdef died"],
                "ActorDiedError: actor <id> died",
                id="ids-of-ray",
            ),
            pytest.param(
                ["at 0x7f3a91b2 in", "at 0x0 in", "at 123e4567-e89b-12d3-a456-426614174000 in"],
                "at <id> in",
                id="addresses-and-uuids",
            ),
            pytest.param(
                ["shape (3, 4, 5) is wrong", "shape (3, 4) is wrong"], "shape (<n>, ...) is wrong", id="shapes"
            ),
            pytest.param(["host 10.0.3.7 is gone", "host 10.12.3.9 is gone"], "host <n> is gone", id="host-addresses"),
            pytest.param(["a  b\n c", "a b c"], "a b c", id="white-space"),
        ],
    )
    def test_texts_that_differ_in_what_is_blanked(self, errors, cause):
        assert [cause_of(error) for error in errors] == [cause] * len(errors)

    @pytest.mark.parametrize(
        "errors",
        [
            pytest.param(["ValueError: boom", "KeyError: boom"], id="type"),
            pytest.param(["ValueError: boom", "ValueError: bang"], id="text"),
            pytest.param(["expected float32", "expected float16"], id="name-with-a-number"),
            pytest.param(["a deadbeefcafe", "a added"], id="words-of-hex-letters"),
            pytest.param(["and/or", "either/or"], id="slash-between-words"),
        ],
    )
    def test_texts_that_differ_otherwise(self, errors):
        assert len({cause_of(error) for error in errors}) == len(errors)

    @given(st.text(max_size=400))
    @example("0" * 5000)
    @example("/" * 5000 + "a")
    @example("a.a." * 3000)
    def test_cause_is_short_and_printable_and_one_line(self, text):
        cause = cause_of(text)
        assert len(cause) <= 300
        assert cause.isprintable()

    @given(st.lists(st.integers(-(10**9), 10**9), min_size=1, max_size=5), st.lists(st.integers(0, 9), min_size=5))
    def test_numbers_never_make_a_cause(self, numbers, others):
        def text(values):
            return "Error: " + " of ".join(str(v) for v in values) + " is wrong"

        assert cause_of(text(numbers)) == cause_of(text(others[: len(numbers)]))

    @given(st.text(alphabet="ab1 /.:-(),<n>x0", max_size=60))
    def test_cause_of_a_cause_is_itself(self, text):
        once = cause_of(text)
        assert cause_of(once) == once


class TestClean:
    @pytest.mark.parametrize(
        "text",
        ["\x1b[2J\x1b[31mred", "a\x07b", "a\rb", "title\x1b]0;evil\x07", "\x9b31m", "right\u202eleft"],
        ids=["escape", "bell", "return", "title", "eight-bit", "direction"],
    )
    def test_nothing_can_drive_a_terminal(self, text):
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202e]", clean(text))

    def test_words_are_kept(self):
        assert clean("größer als π: 図") == "größer als π: 図"


class TestCounts:
    def test_same_cause_has_same_number_and_latest_example(self):
        causes = Causes()
        first, second = causes.number("bad 1", "map 1", 10.0), causes.number("bad 2", "map 2", 20.0)
        assert first == second
        assert (causes[first].example, causes[first].where, causes[first].time) == ("bad 2", "map 2", 20.0)

    def test_ranked_by_units_then_retries_then_losses(self):
        causes = Causes()
        for text, units, retries, losses in (("a", 0, 9, 0), ("b", 2, 0, 0), ("c", 0, 0, 5), ("d", 2, 1, 0)):
            cause = causes[causes.number(text, "", 0.0)]
            cause.units, cause.retries, cause.losses = units, retries, losses
        assert [cause.cause for cause in causes.ranked()] == ["d", "b", "a", "c"]

    def test_cause_that_no_longer_counts_is_not_ranked(self):
        causes = Causes()
        causes.number("a", "", 0.0)
        assert causes.ranked() == []

    def test_endless_causes_fill_no_memory(self):
        causes = Causes()
        words = (f"{a}{b}{c}" for a in "abcdefgh" for b in "abcdefgh" for c in "abcdefgh")
        numbers = [causes.number(f"trouble with {word}", "", 0.0) for word in words]
        assert len(numbers) == 512
        assert len(list(causes)) == MOST_CAUSES + 1
        assert [causes[n].cause for n in numbers[MOST_CAUSES:]] == [OTHERS] * (512 - MOST_CAUSES)
