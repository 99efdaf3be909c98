"""The tally: what a journal says line by line, in order, whatever is in it, and how fast units came."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.causes import NOT_FINITE
from pipeline.tally import (
    DONE,
    FAILED,
    IDLE_SECONDS,
    LEAST_UNITS,
    MOST_REPLICAS,
    PENDING,
    UNTOLD,
    WINDOW_SECONDS,
    Pace,
    Tally,
)
from tests.journal_fixture import START, done, failed, retried, unset


def tally(*entries, units=4):
    found = Tally({"baseline": 2, "map": units})
    for entry in entries:
        found.add(entry)
    return found


class TestStatus:
    @pytest.mark.parametrize(
        ("entries", "status"),
        [
            pytest.param([], UNTOLD, id="nothing"),
            pytest.param([done("map", 1)], DONE, id="done"),
            pytest.param([done("map", 1, failed=2)], FAILED, id="not-finite"),
            pytest.param([failed("map", 1, "boom")], FAILED, id="given-up"),
            pytest.param([failed("map", 1, "boom"), done("map", 1)], DONE, id="failed-then-done"),
            pytest.param([done("map", 1), unset("map", 1)], PENDING, id="found-bad"),
            pytest.param([done("map", 1), unset("map", 1), done("map", 1)], DONE, id="found-bad-then-again"),
            pytest.param([retried(1, "boom")], UNTOLD, id="retried"),
            pytest.param([done("map", 0), done("other", 1), done("baseline", 1)], UNTOLD, id="others"),
        ],
    )
    def test_last_word_counts(self, entries, status):
        assert tally(*entries).groups["map"].status[1] == status

    @given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["done", "failed", "unset", "nan"])), max_size=40))
    def test_counts_equal_those_of_a_dictionary(self, steps):
        make = {
            "done": lambda i: done("map", i),
            "failed": lambda i: failed("map", i, f"boom {i}"),
            "unset": lambda i: unset("map", i),
            "nan": lambda i: done("map", i, failed=1),
        }
        found = tally(*(make[what](index) for index, what in steps))
        last = dict(steps)
        expected = [
            {"done": DONE, "failed": FAILED, "nan": FAILED, "unset": PENDING, None: UNTOLD}[last.get(i)]
            for i in range(4)
        ]
        assert found.groups["map"].status.tolist() == expected
        by_cause = {cause.cause: cause.units for cause in found.failures()}
        words = list(last.values())
        assert by_cause == {
            cause: count
            for cause, count in (("boom <n>", words.count("failed")), (NOT_FINITE, words.count("nan")))
            if count
        }

    @pytest.mark.parametrize(
        "entry",
        [
            {},
            {"time": "yesterday", "group": "map", "index": "1"},
            {"time": float("nan"), "group": ["map"], "index": 1},
            {"time": 10**400, "group": "map", "index": -1},
            {"group": "map", "index": 10**30},
            {"group": "map", "index": True},
            {"group": "map", "index": 1.0},
            {"retried": None, "unit": {}, "replica": "x"},
            {"retried": "x"},
        ],
        ids=["empty", "words", "list", "negative", "huge", "flag", "fraction", "odd-retry", "bare-retry"],
    )
    def test_entry_of_nothing_known_changes_no_unit(self, entry):
        found = tally(entry)
        assert (found.groups["map"].status == UNTOLD).all()

    @pytest.mark.parametrize("value", [None, "7", -3, True, [1], 10**400, float("inf")], ids=repr)
    def test_odd_values_count_as_nothing(self, value):
        names = ("cells", "bytes", "row_forwards", "seconds", "gpu_bytes")
        found = tally(done("map", 1, **dict.fromkeys(names, value)))
        assert found.groups["map"].status[1] == DONE
        assert (found.bytes, found.row_forwards, found.gpu_bytes, found.longest) == (0, 0, 0, 0.0)


class TestTotals:
    def test_sums_and_peaks(self):
        found = tally(
            done("map", 0, 1, bytes=10, row_forwards=3, gpu_bytes=500, seconds=4.0),
            done("map", 1, 5, bytes=20, row_forwards=4, gpu_bytes=300, seconds=2.0),
        )
        assert (found.bytes, found.row_forwards, found.gpu_bytes, found.longest) == (30, 7, 500, 4.0)
        assert found.heard == START + 5
        assert (found.groups["map"].cells, found.groups["map"].seconds) == (8, 6.0)

    def test_retries_and_losses_are_told_apart(self):
        found = tally(
            retried(3, "ValueError: bad 3"),
            retried(None, "ActorDied: node 1", replica=2),
            retried(4, "ValueError: bad 4"),
        )
        assert (found.retries, found.losses) == (2, 1)
        causes = {c.cause: (c.units, c.retries, c.losses, c.where) for c in found.failures()}
        assert causes == {"ValueError: bad <n>": (0, 2, 0, "unit 4"), "ActorDied: node <n>": (0, 0, 1, "replica 2")}
        assert found.replicas[2].losses == 1

    def test_cause_is_dropped_when_its_unit_succeeds(self):
        found = tally(failed("map", 1, "boom"), failed("map", 2, "boom"), done("map", 1))
        assert [(c.cause, c.units) for c in found.failures()] == [("boom", 1)]

    def test_not_finite_cells_are_a_cause(self):
        (cause,) = tally(done("map", 1, failed=3)).failures()
        assert (cause.cause, cause.units, cause.where) == (NOT_FINITE, 1, "map 1")
        assert cause.example == "3 of 4 cells are not finite"


class TestReplicas:
    def test_last_unit_rate_and_peak(self):
        found = tally(
            done("map", 0, 1, replica=7, cells=10, seconds=2.0, gpu_bytes=5),
            done("map", 1, 9, replica=7, cells=30, seconds=2.0, gpu_bytes=3),
        )
        seen = found.replicas[7]
        assert (seen.units, seen.last, seen.heard, seen.gpu_bytes) == (2, "map 1", START + 9, 5)
        assert seen.cells_per_s == 10.0

    def test_rate_is_that_of_the_latest_units(self):
        entries = [done("map", 0, i, cells=1000, seconds=1.0) for i in range(20)]
        entries += [done("map", 0, 20 + i, cells=10, seconds=1.0) for i in range(8)]
        assert tally(*entries).replicas[0].cells_per_s == 10.0

    def test_recent_ones_only(self):
        found = tally(done("map", 0, 0, replica=1), done("map", 1, 100, replica=0), done("map", 2, 400, replica=2))
        assert [r.replica for r in found.recent_replicas(300)] == [0, 2]

    def test_endless_replicas_fill_no_memory(self):
        found = tally(*(done("map", 0, i, replica=i) for i in range(MOST_REPLICAS + 10)))
        assert len(found.replicas) == MOST_REPLICAS
        assert min(found.replicas) == 10


class TestSpeed:
    def test_none_before_the_first_unit(self):
        assert Pace().speed() is None

    def test_single_unit_is_judged_by_its_seconds(self):
        pace = Pace()
        pace.add(START + 20, 20.0, 5)
        speed = pace.speed()
        assert (speed.units_per_s, speed.cells_per_s, speed.busy, speed.span_s) == pytest.approx((0.05, 0.25, 1, 20))

    @pytest.mark.parametrize("replicas", [1, 4, 16], ids="{}-replicas".format)
    def test_steady_replicas_are_all_busy(self, replicas):
        pace = Pace()
        for turn in range(1, 500):
            for r in range(replicas):
                pace.add(START + 3 * turn + r * 3 / replicas, 3.0, 6)
        speed = pace.speed()
        assert speed.busy == pytest.approx(replicas, rel=0.02)
        assert speed.cells_per_s == pytest.approx(2 * replicas, rel=0.02)
        assert WINDOW_SECONDS <= speed.span_s <= WINDOW_SECONDS + 5

    def test_what_was_before_the_last_minutes_does_not_count(self):
        pace = Pace()
        for i in range(1000):
            pace.add(START + i * 0.1, 0.1, 1)
        for i in range(1, 400):
            pace.add(START + 100 + i, 1.0, 1)
        assert pace.speed().units_per_s == pytest.approx(1.0, rel=0.02)

    def test_long_units_are_judged_by_some_number_of_them(self):
        pace = Pace()
        for i in range(1, 100):
            pace.add(START + 600 * i, 600.0, 60)
        speed = pace.speed()
        assert speed.busy == pytest.approx(1.0)
        assert LEAST_UNITS * 600 <= speed.span_s <= (LEAST_UNITS + 1) * 600

    def test_night_between_two_runs_does_not_count(self):
        pace = Pace()
        for i in range(5):
            pace.add(START + i, 1.0, 1)
        for i in range(5):
            pace.add(START + 30_000 + i, 1.0, 1)
        assert pace.speed().units_per_s == pytest.approx(1.0)

    def test_silence_that_a_long_unit_explains_counts(self):
        pace = Pace()
        pace.add(START, 1.0, 1)
        pace.add(START + 2 * IDLE_SECONDS, 2 * IDLE_SECONDS, 1)
        speed = pace.speed()
        assert speed.span_s == pytest.approx(2 * IDLE_SECONDS + 1)
        assert speed.busy == pytest.approx(1.0)

    def test_clock_that_is_set_back_gives_no_nonsense(self):
        pace = Pace()
        for second in (100, 101, 40, 41, 102):
            pace.add(START + second, 1.0, 1)
        speed = pace.speed()
        assert speed.span_s > 0
        assert speed.units_per_s * speed.span_s == pytest.approx(5)

    @given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e4), st.integers(0, 10**6)), min_size=1, max_size=60))
    def test_numbers_are_always_finite_and_not_negative(self, units):
        pace = Pace()
        for time, seconds, cells in units:
            pace.add(time, seconds, cells)
        speed = pace.speed()
        values = [speed.units_per_s, speed.cells_per_s, speed.busy, speed.span_s]
        assert np.isfinite(values).all()
        assert min(values) >= 0


def test_memory_does_not_grow_with_lines():
    found = tally(units=1000)

    def feed(first, count):
        for i in range(first, first + count):
            text = f"ValueError: tried {i} at /data/{i}.png"
            entry = failed("map", i % 1000, text, i) if i % 3 else done("map", i % 1000, i, replica=i % 50)
            found.add(entry)

    feed(0, 12_000)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        feed(12_000, 12_000)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert found.entries == 24_000
    assert grown < 1_500_000
