"""The rule that chooses the rows of one forward from what was measured: a pure function, so laws."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import SweepConfig
from pipeline.plan import make_plan
from pipeline.rows import (
    CLOSE,
    MEMORY_RATIO,
    MOST_ROWS,
    Measured,
    Table,
    as_data,
    choose,
    from_data,
    loops_by_size,
    memory_limit,
    sampled_groups,
)

PLENTY = 10**15


def table(batches, peaks=None, *, bare=100, whole=True):
    peaks = peaks or {}
    return Table(
        bare_peak=bare,
        batches=tuple(Measured(rows=n, seconds=s, peak=peaks.get(n, 100)) for n, s in batches.items()),
        whole=whole,
    )


@st.composite
def tables(draw: st.DrawFn) -> Table:
    rows = sorted({1, *draw(st.lists(st.integers(2, MOST_ROWS), max_size=6))})
    batches = [Measured(rows=n, seconds=draw(st.floats(1e-4, 1e3)), peak=draw(st.integers(0, 10_000))) for n in rows]
    return Table(bare_peak=draw(st.integers(0, 5000)), batches=tuple(batches), whole=draw(st.booleans()))


groups = st.dictionaries(st.integers(1, 200), st.integers(0, 500), max_size=5)
limits = st.integers(0, 20_000)


class TestLaws:
    @settings(deadline=None)
    @given(tables(), groups, limits)
    def test_never_over_the_limit_unless_one_row_is(self, found, sizes, limit):
        rows = choose(found, sizes, limit)
        assert rows == 1 or found.peak(rows) <= limit

    @settings(deadline=None)
    @given(tables(), groups, limits)
    def test_never_more_rows_than_were_measured(self, found, sizes, limit):
        assert 1 <= choose(found, sizes, limit) <= found.most

    @settings(deadline=None)
    @given(tables(), groups, limits, limits)
    def test_more_memory_never_gives_fewer_rows(self, found, sizes, one, other):
        less, more = sorted((one, other))
        assert choose(found, sizes, less) <= choose(found, sizes, more)

    @settings(deadline=None)
    @given(tables(), groups, limits)
    def test_fewer_rows_would_take_longer_and_no_allowed_number_much_less(self, found, sizes, limit):
        def seconds(rows):
            def of(size):
                full, rest = divmod(size, rows)
                return full * found.seconds(rows) + (found.seconds(rest) if rest else 0)

            return sum(loops * of(size) for size, loops in sizes.items())

        rows = choose(found, sizes, limit)
        measured = {each.rows for each in found.batches}
        even = {
            n
            for size in sizes
            for n in range(1, found.most + 1)
            if all(-(-size // m) > -(-size // n) for m in range(1, n))
        }
        allowed = [n for n in sorted(measured | even) if n == 1 or found.peak(n) <= limit]
        least = min(map(seconds, allowed))
        assert seconds(rows) <= least * (1 + CLOSE) + 1e-9
        assert all(seconds(n) > least for n in allowed if n < rows)

    @settings(deadline=None)
    @given(tables())
    def test_neither_peaks_nor_seconds_ever_fall(self, found):
        peaks = [found.peak(n) for n in range(1, found.most + 1)]
        assert peaks == sorted(peaks)
        seconds = [found.seconds(n) for n in range(1, found.most + 1)]
        assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(seconds))
        assert all(found.seconds(b.rows) <= b.seconds for b in found.batches)

    @settings(deadline=None)
    @given(tables())
    def test_survives_being_written_as_data(self, found):
        assert from_data(as_data(found)) == found


class TestChoice:
    @pytest.mark.parametrize(
        ("seconds", "sizes", "rows"),
        [
            pytest.param({1: 1, 2: 1, 4: 1, 8: 1}, {8: 1}, 8, id="forwards-cost-the-same"),
            pytest.param({1: 1, 2: 2, 4: 4, 8: 8}, {8: 1}, 1, id="rows-cost-the-same"),
            pytest.param({1: 1, 2: 1.2, 4: 2.38, 8: 4.75}, {8: 1}, 2, id="hardly-faster-is-not-worth-it"),
            pytest.param({1: 1, 2: 2, 4: 4, 8: 16}, {8: 1}, 1, id="more-is-worse"),
            pytest.param({1: 1, 8: 1, 16: 1}, {18: 1}, 9, id="two-forwards-of-nine-not-of-sixteen-and-two"),
            pytest.param({1: 1, 8: 1, 16: 1}, {3: 10, 16: 10}, 16, id="small-groups-do-not-ask-for-small-batches"),
            pytest.param({1: 1, 2: 1, 4: 1, 8: 1}, {3: 1}, 3, id="no-larger-than-the-largest-group"),
            pytest.param({1: 1, 2: 1.2, 4: 9, 8: 2, 16: 2.5, 18: 3}, {18: 1}, 18, id="one-disturbed-measurement"),
            pytest.param({1: 1}, {8: 1}, 1, id="only-one-was-measured"),
            pytest.param({1: 1, 2: 1}, {}, 1, id="nothing-to-share"),
        ],
    )
    def test_of_a_table(self, seconds, sizes, rows):
        assert choose(table(seconds), sizes, PLENTY) == rows

    @pytest.mark.parametrize(("limit", "rows"), [(99, 1), (100, 1), (150, 1), (200, 2), (399, 2), (400, 4), (800, 8)])
    def test_memory_bounds_it(self, limit, rows):
        found = table({1: 1, 2: 1, 4: 1, 8: 1}, {1: 100, 2: 200, 4: 400, 8: 800})
        assert choose(found, {8: 1}, limit) == rows

    def test_between_two_measured_numbers_the_larger_ones_memory_counts(self):
        found = table({1: 1, 4: 1}, {1: 100, 4: 400})
        assert choose(found, {3: 1}, 399) == 1
        assert choose(found, {3: 1}, 400) == 3

    @pytest.mark.parametrize(
        ("capacity", "limit"), [(None, 1300), (5000, 1300), (1200, 1200)], ids=["unknown", "much", "little"]
    )
    def test_limit_is_a_multiple_of_the_bare_peak_and_what_there_is(self, capacity, limit):
        assert MEMORY_RATIO == 1.3
        assert memory_limit(table({1: 1}, bare=1000), capacity) == limit


class TestTable:
    def test_seconds_between_two_are_on_the_line(self):
        found = table({1: 1.0, 3: 2.0, 4: 10.0})
        assert [found.seconds(n) for n in (1, 2, 3, 4, 9)] == [1.0, 1.5, 2.0, 10.0, 10.0]

    @pytest.mark.parametrize(
        ("rows", "whole", "needed", "enough"),
        [
            (8, False, 8, True),
            (8, False, 9, False),
            (8, True, 9, True),
            (MOST_ROWS, False, 10 * MOST_ROWS, True),
        ],
        ids=["as many", "fewer", "more would not pay", "as many as are ever tried"],
    )
    def test_reaches_what_a_plan_can_use(self, rows, whole, needed, enough):
        assert table({1: 1, rows: 1}, whole=whole).reaches(needed) == enough

    @pytest.mark.parametrize(
        "change",
        [
            {"batches": []},
            {"batches": [[2, 1.0, 5]]},
            {"batches": [[1, 1.0, 5], [4, 1.0, 5], [2, 1.0, 5]]},
            {"batches": [[1, 1.0, 5], [1, 1.0, 5]]},
            {"batches": [[1, 0.0, 5]]},
            {"batches": [[1, math.inf, 5]]},
            {"batches": [[1, math.nan, 5]]},
            {"batches": [[1, 1.0, -5]]},
            {"batches": [[1, 1.0]]},
            {"batches": [[1.0, 1.0, 5]]},
            {"batches": 3},
            {"bare_peak": -1},
            {"bare_peak": "much"},
        ],
        ids=["empty", "no-first", "unsorted", "twice", "no-time", "endless", "nan", "less-than-nothing", "short",
             "fraction", "no-list", "bare-below-nothing", "bare-word"],
    )  # fmt: skip
    def test_nonsense_is_no_table(self, change):
        good = as_data(table({1: 1.0}))
        assert from_data(good)
        with pytest.raises((ValueError, TypeError, LookupError)):
            from_data({**good, **change})

    @pytest.mark.parametrize("data", [None, 3, [], {}, {"batches": [[1, 1.0, 5]]}], ids=str)
    def test_what_is_no_mapping_of_it_is_no_table(self, data):
        with pytest.raises((ValueError, TypeError, LookupError)):
            from_data(data)


def plan_of(**changes):
    raw = {
        "name": "rows",
        "model": {"id": "embedded:maze"},
        "task": {"name": "maze", "mazes": 1},
        "sampler": {"steps": 5},
        "metrics": ["goal_evidence"],
        "experiments": {
            "map": {"kind": "patch", "step": "all", "layer": "all", "component": ["attn1", "ffn"]},
            "skip": {"kind": "step_skip", "mode": ["freeze", "drop"], "step": [1, 3]},
        },
        **changes,
    }
    return make_plan(SweepConfig.model_validate(raw))


class TestGroups:
    def test_of_a_plan_are_those_of_its_cells(self):
        plan = plan_of()
        blocks = plan.geometry.blocks
        # Patches of step s compute 5 - s steps; a frozen or dropped step is not computed, only those after it.
        assert loops_by_size(sampled_groups(plan)) == Counter({2 * blocks: 5 + 4 + 3 + 2 + 1, 1: 2 * (3 + 1)})

    def test_do_not_depend_on_the_rows_of_the_config(self):
        few, many = plan_of(engine={"batch_rows": 1}), plan_of(engine={"batch_rows": 50})
        assert loops_by_size(sampled_groups(few)) == loops_by_size(sampled_groups(many))

    def test_of_many_units_the_first_middle_and_last_stand_for_all(self):
        plan = plan_of(unit_cells=1)
        steps = {row.step for group in sampled_groups(plan) for row in group.rows if row.kind == "patch"}
        assert steps == {0, 2, 4}
