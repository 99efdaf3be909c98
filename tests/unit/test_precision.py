"""Rounds, intervals under looks and the stopping rule: laws of pure functions, and coverage on planted values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import ValidationError
from scipy import stats

from pipeline.looks import spread_level, union_level
from pipeline.precision import (
    LEAST_FIRST,
    NoRoundsError,
    Observed,
    Precision,
    Rounds,
    level_at_look,
    mean_bounds,
    narrow,
    prompt_means,
    ratio_bounds,
)
from pipeline.samples import Sample

LEVEL = 0.98
"""Of the interval at one look."""


def precision_of(half_width: float = 0.5, **changes: object) -> Precision:
    return Precision(**{"half_width": half_width, "metric": "solved", "first": LEAST_FIRST, **changes})


def samples_of(problems: int, pairs: tuple[str, ...] = ("a/b",), seeds: int = 1) -> list[Sample]:
    """Samples of every problem beside each other, as tasks order them."""
    made = [(f"p{p}", pair, seed) for p in range(problems) for seed in range(seeds) for pair in pairs]
    return [
        Sample(index=i, prompt=prompt, seed=seed, pair=pair, clean_prompt="a", corrupted_prompt="b")
        for i, (prompt, pair, seed) in enumerate(made)
    ]


class TestRounds:
    @pytest.mark.parametrize(
        ("problems", "growth", "expected"),
        [
            pytest.param(64, 2.0, (8, 16, 32, 64), id="doubling"),
            pytest.param(33, 2.0, (8, 16, 32, 33), id="a short last round"),
            pytest.param(20, 1.25, (8, 10, 13, 17, 20), id="growth is rounded up"),
            pytest.param(9, 2.0, (8, 9), id="one more problem"),
        ],
    )
    def test_each_is_growth_times_the_one_before(self, problems, growth, expected):
        rounds = Rounds.of(precision_of(first=8, growth=growth), samples_of(problems))
        assert rounds.problems == rounds.samples == expected
        assert rounds.looks == len(expected)

    @settings(deadline=None)
    @given(
        problems=st.integers(LEAST_FIRST + 1, 80),
        pairs=st.integers(1, 3),
        seeds=st.integers(1, 3),
        first=st.integers(LEAST_FIRST, 20),
        growth=st.floats(1.25, 5),
    )
    def test_end_with_whole_problems_and_cover_all_samples(self, problems, pairs, seeds, first, growth):
        assume(first < problems)
        samples = samples_of(problems, tuple(f"x/{i}" for i in range(pairs)), seeds)
        rounds = Rounds.of(precision_of(first=first, growth=growth), samples)
        assert list(rounds.problems) == sorted(set(rounds.problems))
        assert (rounds.problems[0], rounds.problems[-1]) == (first, problems)
        assert rounds.samples == tuple(p * pairs * seeds for p in rounds.problems)
        for sample in range(len(samples)):
            round_ = rounds.round_of(sample)
            assert sample < rounds.samples[round_]
            assert round_ == 0 or sample >= rounds.samples[round_ - 1]
        assert rounds.prompts == (rounds.problems,), "every pair kind has every problem"

    def test_the_first_look_waits_for_every_pair_kind(self):
        """Prompts of two kinds one after the other: at eight problems there are four of each."""
        samples = [
            Sample(index=i, prompt=f"p{i}", seed=0, pair=f"x/{i % 2}", clean_prompt="a", corrupted_prompt="b")
            for i in range(40)
        ]
        rounds = Rounds.of(precision_of(first=8, growth=2), samples)
        assert rounds.problems == (16, 32, 40)
        assert rounds.prompts == ((16, 32, 40), (8, 16, 20))

    @pytest.mark.parametrize(
        ("samples", "message"),
        [
            pytest.param(samples_of(8), "first look is at 8 prompts .* has 8 problems", id="no problem after it"),
            pytest.param(samples_of(3), "first look is at 8 prompts .* has 3 problems", id="too few problems"),
            pytest.param(samples_of(20, ("a/b",))[:19] + samples_of(1, ("a/c",)), "lie apart", id="problem in pieces"),
        ],
    )
    def test_are_refused_where_nothing_could_stop(self, samples, message):
        with pytest.raises(NoRoundsError, match=message):
            Rounds.of(precision_of(first=8), samples)


@pytest.mark.parametrize(
    "wrong",
    [
        {"half_width": 0.0},
        {"half_width": math.inf},
        {"first": LEAST_FIRST - 1},
        {"growth": 1.0},
        {"level": 1.0},
        {"level": 0.1},
        {"by": "ratio"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Precision(**{"half_width": 0.1, "metric": "solved", **wrong})


finite = st.floats(-100, 100).map(lambda x: float(np.float32(x)))
values = arrays.arrays(np.float64, st.tuples(st.integers(2, 12), st.integers(1, 5)), elements=finite)


class TestMean:
    @settings(deadline=None)
    @given(values, st.floats(0.5, 0.999))
    def test_is_the_t_interval(self, x, level):
        assume((x.std(axis=0) > 1e-3).all())
        found = mean_bounds(x, level=level)
        expected = stats.t.interval(level, len(x) - 1, x.mean(axis=0), stats.sem(x, axis=0))
        np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-6, atol=1e-9)

    @settings(deadline=None)
    @given(values, st.data())
    def test_of_a_cell_knows_nothing_of_other_cells(self, x, data):
        order = data.draw(st.permutations(range(x.shape[1])))
        whole, turned = (mean_bounds(v, level=0.95) for v in (x, x[:, order]))
        alone = mean_bounds(x[:, :1].copy(), level=0.95)
        for name in ("value", "low", "high", "n"):
            assert np.array_equal(getattr(whole, name)[list(order)], getattr(turned, name), equal_nan=True)
            assert np.array_equal(getattr(whole, name)[:1], getattr(alone, name), equal_nan=True)

    @settings(deadline=None)
    @given(finite, st.integers(2, 12))
    def test_of_equal_values_has_no_width(self, value, n):
        found = mean_bounds(np.full((n, 1), value), level=0.95)
        assert (found.low[0], found.high[0]) == (value, value)

    def test_leaves_missing_values_out(self):
        x = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, 5.0], [4.0, np.nan]])
        found = mean_bounds(x, level=0.95)
        alone = mean_bounds(np.array([[1.0], [2.0], [4.0]]), level=0.95)
        assert (found.low[0], found.high[0], found.n[0]) == (alone.low[0], alone.high[0], 3)
        assert found.value[1] == 5.0
        assert np.isnan(found.half_width[1])

    def test_without_any_value_has_no_bounds(self):
        found = mean_bounds(np.full((3, 1), np.nan), level=0.95)
        assert np.isnan([found.value[0], found.low[0], found.high[0]]).all()


class TestRatio:
    def test_holds_the_ratios_that_a_t_test_does_not_exclude(self):
        generator = np.random.default_rng(2)
        bottom = 1 + 0.3 * generator.standard_normal((10, 4))
        top = 0.6 * bottom + 0.2 * generator.standard_normal((10, 4))
        found = ratio_bounds(top, bottom, level=0.95)
        for cell in range(4):
            for bound, outward in ((found.low[cell], -1e-4), (found.high[cell], 1e-4)):
                for ratio, excluded in ((bound + outward, True), (bound - outward, False)):
                    p = stats.ttest_1samp(top[:, cell] - ratio * bottom[:, cell], 0).pvalue
                    assert (p < 0.05) == excluded

    def test_is_unbounded_where_the_gap_may_be_zero(self):
        bottom = np.array([[1.0], [-1.0], [0.5], [-0.4], [0.2], [0.1]])
        found = ratio_bounds(np.ones((6, 1)), bottom, level=0.95)
        assert (found.low[0], found.high[0]) == (-np.inf, np.inf)
        assert np.isfinite(found.value[0])

    def test_of_equal_pairs_has_no_width(self):
        found = ratio_bounds(np.full((6, 1), 0.5), np.full((6, 1), 2.0), level=0.95)
        assert (found.low[0], found.value[0], found.high[0]) == (0.25, 0.25, 0.25)

    def test_counts_a_unit_only_where_both_are_known(self):
        top, bottom = np.arange(1.0, 7.0)[:, None], np.full((6, 1), 2.0)
        holed = top.copy()
        holed[5] = np.nan
        assert ratio_bounds(holed, bottom, level=0.95).n[0] == 5
        assert ratio_bounds(top, np.where(top > 2, bottom, np.nan), level=0.95).n[0] == 4


@settings(deadline=None)
@given(values, st.data())
def test_prompt_means_are_those_of_each_prompt_alone(x, data):
    prompts = data.draw(st.lists(st.sampled_from("abc"), min_size=len(x), max_size=len(x)))
    holes = data.draw(arrays.arrays(np.bool_, x.shape))
    x = np.where(holes, np.nan, x)
    found = prompt_means(x, prompts)
    for row, prompt in enumerate(dict.fromkeys(prompts)):
        mine = x[[i for i, p in enumerate(prompts) if p == prompt]]
        for cell in range(x.shape[1]):
            kept = mine[:, cell][np.isfinite(mine[:, cell])]
            assert np.isnan(found[row, cell]) if not kept.size else found[row, cell] == pytest.approx(kept.mean())


@st.composite
def observations(draw: st.DrawFn, pairs: tuple[str, ...] = ("a/b", "a/c")) -> Observed:
    problems, cells = draw(st.integers(LEAST_FIRST, 10)), draw(st.integers(1, 6))
    kinds = pairs[: draw(st.integers(1, len(pairs)))]
    keys = [(pair, f"p{p}") for p in range(problems) for pair in kinds]
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    scale = draw(arrays.arrays(np.float64, cells, elements=st.sampled_from([0.0, 0.05, 0.5, 2.0])))
    x = 0.3 + scale * generator.standard_normal((len(keys), cells))
    holes = generator.random(x.shape) < draw(st.sampled_from([0.0, 0.1]))
    return Observed(
        values=np.where(holes, np.nan, x),
        reference=np.zeros((len(keys), 1)),
        clean=1 + 0.1 * generator.standard_normal(len(keys)),
        corrupted=np.zeros(len(keys)),
        keys=keys,
    )


def changed(observed: Observed, **changes: object) -> Observed:
    fields = ("values", "reference", "clean", "corrupted", "keys")
    return Observed(**{name: changes.get(name, getattr(observed, name)) for name in fields})


by = st.sampled_from(["difference", "recovery"])


class TestStopping:
    @settings(deadline=None)
    @given(observations(), by, st.floats(1e-3, 3), st.floats(0.1, 1))
    def test_a_smaller_half_width_never_stops_more(self, observed, by, half_width, share):
        wide, fine = (narrow(observed, precision_of(w, by=by), LEVEL) for w in (half_width, share * half_width))
        assert not (fine & ~wide).any()

    @settings(deadline=None)
    @given(observations(), by, st.floats(1e-3, 3), st.floats(0.9, 0.97))
    def test_a_higher_level_never_stops_more(self, observed, by, half_width, lower):
        sure, less = (narrow(observed, precision_of(half_width, by=by), level) for level in (LEVEL, lower))
        assert not (sure & ~less).any()

    @settings(deadline=None)
    @given(observations(), by, st.floats(1e-3, 3), st.data())
    def test_of_a_cell_depends_on_its_own_values_alone(self, observed, by, half_width, data):
        order = data.draw(st.permutations(range(observed.values.shape[1])))
        wanted = precision_of(half_width, by=by)
        found = narrow(observed, wanted, LEVEL)
        assert np.array_equal(
            found[list(order)], narrow(changed(observed, values=observed.values[:, order]), wanted, LEVEL)
        )
        alone = [narrow(changed(observed, values=observed.values[:, [i]]), wanted, LEVEL)[0] for i in range(len(found))]
        assert found.tolist() == alone

    @settings(deadline=None)
    @given(observations(), st.floats(1e-3, 3))
    def test_needs_every_pair_kind(self, observed, half_width):
        wanted = precision_of(half_width)
        pairs = dict.fromkeys(pair for pair, _ in observed.keys)
        assume(len(pairs) == 2)
        each = []
        for pair in pairs:
            rows = [i for i, key in enumerate(observed.keys) if key[0] == pair]
            part = {name: getattr(observed, name)[rows] for name in ("values", "reference", "clean", "corrupted")}
            each.append(narrow(Observed(**part, keys=[observed.keys[i] for i in rows]), wanted, LEVEL))
        assert not (narrow(observed, wanted, LEVEL) & ~(each[0] & each[1])).any()

    @settings(deadline=None)
    @given(observations(), st.floats(1e-3, 3), st.floats(-5, 5))
    def test_of_differences_does_not_depend_on_where_they_lie(self, observed, half_width, shift):
        """The rule sees the spread alone, so that the mean at which it stops is not drawn to either side."""
        steady = narrow(observed, precision_of(half_width), LEVEL)
        moved = narrow(changed(observed, values=observed.values + shift), precision_of(half_width * 1.0001), LEVEL)
        assert not (steady & ~moved & (np.nanstd(observed.values, axis=0) > 1e-3)).any()

    @settings(deadline=None)
    @given(observations(("a/b",)), by, st.integers(0, 5))
    def test_a_cell_with_too_few_values_goes_on_however_equal_they_are(self, observed, by, kept):
        values = np.full(observed.values.shape, 0.5)
        values[kept:] = np.nan
        assert not narrow(changed(observed, values=values), precision_of(1e9, by=by), LEVEL).any()

    def test_a_cell_whose_values_are_all_equal_stops(self):
        keys = [("a/b", f"p{i}") for i in range(LEAST_FIRST)]
        zeros, ones = np.zeros(LEAST_FIRST), np.ones(LEAST_FIRST)
        same = Observed(values=zeros[:, None], reference=zeros[:, None], clean=ones, corrupted=zeros, keys=keys)
        assert narrow(same, precision_of(1e-12), LEVEL).all()

    def test_seeds_of_a_prompt_are_no_prompts(self):
        """Six seeds of one prompt are one value, and nothing is known of other prompts."""
        keys = [("a/b", "p0")] * 12
        zeros = np.zeros(12)
        one = Observed(values=zeros[:, None], reference=zeros[:, None], clean=zeros + 1, corrupted=zeros, keys=keys)
        assert not narrow(one, precision_of(1e9), LEVEL).any()

    def test_a_recovery_without_a_gap_never_stops(self):
        keys = [("a/b", f"p{i}") for i in range(8)]
        zeros = np.zeros(8)
        flat = Observed(values=zeros[:, None], reference=zeros[:, None], clean=zeros, corrupted=zeros, keys=keys)
        assert not narrow(flat, precision_of(1e9, by="recovery"), LEVEL).any()
        assert narrow(flat, precision_of(1e-9), LEVEL).all()


class TestCoverage:
    """Cells of planted normal differences, looked at after 8, 16, 32 and 64 prompts."""

    ENDS, CELLS = (8, 16, 32, 64), 20_000

    def stopped(self, half_width: float, level: float) -> tuple[float, float]:
        """Return the share of cells whose interval holds the planted mean when they stop, and their prompts."""
        x = 0.4 + np.random.default_rng(11).standard_normal((64, self.CELLS))
        going, covered, used = (np.full(self.CELLS, v) for v in (True, False, 0))
        for end in self.ENDS:
            bounds = mean_bounds(x[:end], level=level)
            stops = going & ((bounds.half_width <= half_width) | (end == self.ENDS[-1]))
            covered[stops] = ((bounds.low <= 0.4) & (bounds.high >= 0.4))[stops]
            used[stops], going = end, going & ~stops
        return float(covered.mean()), float(used.mean())

    @pytest.mark.parametrize("by", ["difference", "recovery"])
    @pytest.mark.parametrize("half_width", [0.3, 0.45, 0.6, 0.8, 1.1], ids=lambda w: f"half width {w}")
    def test_at_whatever_look_a_cell_stops_is_at_least_the_level(self, half_width, by):
        covered, used = self.stopped(half_width, level_at_look(by, 0.95, [self.ENDS]))
        least = stats.binom.ppf(1e-6, self.CELLS, 0.95) / self.CELLS
        assert covered >= least
        assert 8 <= used <= 64

    def test_without_a_higher_level_at_each_look_is_below_it(self):
        """So the law above can fail: intervals that do not know of the looks cover too rarely."""
        worst = min(self.stopped(w, 0.95)[0] for w in (0.45, 0.6, 0.7))
        assert worst < stats.binom.ppf(1e-6, self.CELLS, 0.95) / self.CELLS

    def test_is_not_wider_than_it_must_be(self):
        level = level_at_look("difference", 0.95, [self.ENDS])
        assert min(self.stopped(w, level)[0] for w in (0.45, 0.6, 0.7)) < 0.965

    def test_of_other_metrics_is_at_least_the_level(self):
        """A second metric that had no part in the rule, and has much in common with the first."""
        x = np.random.default_rng(13).standard_normal((64, self.CELLS))
        other = 0.8 * x + 0.6 * np.random.default_rng(14).standard_normal(x.shape)
        level, going = level_at_look("difference", 0.95, [self.ENDS]), np.full(self.CELLS, True)
        covered = np.full(self.CELLS, False)
        for end in self.ENDS:
            stops = going & ((mean_bounds(x[:end], level=level).half_width <= 0.6) | (end == 64))
            bounds = mean_bounds(other[:end], level=level)
            covered[stops], going = ((bounds.low <= 0) & (bounds.high >= 0))[stops], going & ~stops
        assert covered.mean() >= stats.binom.ppf(1e-6, self.CELLS, 0.95) / self.CELLS

    def test_of_the_rule_itself_is_that_of_the_interval(self):
        """``narrow`` stops just the cells whose interval is narrow."""
        x = np.random.default_rng(5).standard_normal((8, 500))
        keys = [("a/b", f"p{i}") for i in range(8)]
        observed = Observed(values=x, reference=np.zeros((8, 1)), clean=np.ones(8), corrupted=np.zeros(8), keys=keys)
        found = narrow(observed, precision_of(0.9, first=8), LEVEL)
        assert np.array_equal(found, mean_bounds(x, level=LEVEL).half_width <= 0.9)
        assert 0 < found.sum() < 500

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10**6))
    def test_the_mean_at_the_stop_is_not_biased(self, seed):
        """Of normal values the mean knows nothing of the spread that stops them."""
        x = np.random.default_rng(seed).standard_normal((16, 4000))
        early = mean_bounds(x[:8], level=0.95)
        stops = early.half_width <= np.median(early.half_width)
        assert abs(early.value[stops].mean()) < 6 * (1 / math.sqrt(8)) / math.sqrt(stops.sum())


class TestLevels:
    ends = st.lists(st.integers(1, 40), min_size=1, max_size=6).map(
        lambda steps: tuple(np.cumsum([5, *steps]).tolist())
    )

    @settings(max_examples=20, deadline=None)
    @given(ends, st.floats(0.6, 0.99))
    def test_for_spreads_lies_between_the_level_and_that_of_the_union(self, ends, level):
        assert level - 1e-5 <= spread_level(level, [ends]) <= union_level(level, len(ends)) + 0.011 * (1 - level)

    @pytest.mark.parametrize("ends", [(8, 16), (8, 12, 18, 27, 41, 48), (6, 50)], ids=str)
    def test_for_spreads_is_that_of_a_simulation(self, ends):
        """Of the least coverage over looks, from sums of squares that are drawn."""
        generator = np.random.default_rng(4)
        squares = np.cumsum([generator.chisquare(d, 100_000) for d in np.diff([1, *ends])], axis=0)
        spreads = np.sqrt(squares / (np.array(ends)[:, None] - 1))
        reach = stats.t.ppf((1 + spread_level(0.95, [ends])) / 2, np.array(ends) - 1)[:, None]
        covered = (2 * stats.norm.cdf(reach * spreads) - 1).min(axis=0).mean()
        assert 0.95 <= covered < 0.952

    def test_of_one_look_is_the_level_itself(self):
        assert spread_level(0.9, [(12,)]) == union_level(0.9, 1) == 0.9

    def test_for_several_pair_kinds_is_the_highest(self):
        few, many = (8, 16), (8, 12, 18, 27)
        assert spread_level(0.95, [few, many]) == max(spread_level(0.95, [ends]) for ends in (few, many))

    def test_of_recoveries_is_that_of_the_union(self):
        """The width of a ratio knows of means, so nothing is known of the look where it stops."""
        assert level_at_look("recovery", 0.95, [(8, 16, 32)]) == union_level(0.95, 3)
        assert level_at_look("difference", 0.95, [(8, 16, 32)]) == spread_level(0.95, [(8, 16, 32)])
