"""Effects of experiments in rounds: tests and intervals that hold at every look, and what is written of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

import tests.synthetic
from pipeline.effects import compute_effects, open_effects
from pipeline.effects.sequential import holm, looks_of, p_values
from pipeline.looks import spread_level, union_level
from pipeline.precision import mean_bounds, ratio_bounds
from pipeline.report import write_report
from tests.rounds_fixture import MAP, PRECISION, plan_of, sweep
from tests.sweep_fixture import arrays as arrays_of

p_lists = arrays.arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 1))


class TestPValues:
    @pytest.mark.parametrize("looks", [1, 4])
    def test_are_those_of_the_t_test_times_the_looks(self, looks):
        x = np.random.default_rng(1).normal(0.4, 1, (12, 50))
        expected = np.minimum(1, looks * stats.ttest_1samp(x, 0).pvalue)
        np.testing.assert_allclose(p_values(x, looks=looks), expected, rtol=1e-9)

    @settings(deadline=None)
    @given(st.floats(0.01, 0.5), st.integers(1, 5), st.integers(0, 10**6))
    def test_are_small_just_where_the_interval_excludes_zero(self, alpha, looks, seed):
        x = np.random.default_rng(seed).normal(0.5, 1, (10, 20))
        bounds = mean_bounds(x, level=union_level(1 - alpha, looks))
        excludes, p = (bounds.low > 0) | (bounds.high < 0), p_values(x, looks=looks)
        clear = np.abs(p - alpha) > 1e-9
        assert np.array_equal((p <= alpha)[clear], excludes[clear])

    @pytest.mark.parametrize(
        ("value", "expected"),
        [pytest.param(0.0, 1.0, id="no effect"), pytest.param(-1.0, 3 * 2.0**-7, id="the same effect everywhere")],
    )
    def test_of_equal_differences_claim_no_more_than_signs_do(self, value, expected):
        assert p_values(np.full((8, 1), value), looks=3)[0] == expected

    def test_of_one_unit_are_unknown(self):
        assert np.isnan(p_values(np.array([[1.0, 1.0], [np.nan, 2.0]]), looks=2)).tolist() == [True, False]

    def test_of_cells_that_stopped_reject_a_true_null_as_rarely_as_they_say(self):
        """Looked at after 8, 16 and 32 prompts, stopped when narrow; with cells of different lengths side by side."""
        ends, cells = (8, 16, 32), 20_000
        x = np.random.default_rng(3).standard_normal((32, cells))
        for half_width in (0.5, 0.7, 1.0):
            used = np.zeros(cells, dtype=int)
            for end in reversed(ends):
                used[
                    (mean_bounds(x[:end], level=spread_level(0.95, [ends])).half_width <= half_width) | (end == 32)
                ] = end
            p = p_values(np.where(np.arange(32)[:, None] < used, x, np.nan), looks=3)
            assert len(set(used)) > 1
            assert (p <= 0.05).mean() <= stats.binom.ppf(1 - 1e-6, cells, 0.05) / cells


class TestHolm:
    @settings(deadline=None)
    @given(p_lists)
    def test_is_the_step_down_procedure(self, p):
        order, expected, worst = np.argsort(p, kind="stable"), np.empty(len(p)), 0.0
        for rank, i in enumerate(order):
            worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
            expected[i] = worst
        assert holm(p).tolist() == expected.tolist()

    @settings(deadline=None)
    @given(p_lists, st.data())
    def test_does_not_depend_on_the_order_of_cells(self, p, data):
        order = data.draw(st.permutations(range(len(p))))
        np.testing.assert_array_equal(holm(p)[list(order)], holm(p[list(order)]))

    def test_leaves_out_what_is_unknown(self):
        np.testing.assert_array_equal(holm(np.array([[0.02, np.nan], [0.5, 0.01]])), [[0.04, np.nan], [0.5, 0.03]])

    def test_keeps_the_family_wise_error_rate(self):
        p = np.random.default_rng(8).uniform(size=(20_000, 15))
        errors = np.mean([holm(row).min() <= 0.05 for row in p])
        assert errors <= stats.binom.ppf(1 - 1e-6, len(p), 0.05) / len(p)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pair kinds; the recorded runs lie ten apart, so that recoveries are known."""
    path, plain = tmp_path_factory.mktemp("effects") / "run.zarr", tests.synthetic.sample_values

    def apart(group: str, name: str, sample: int, shape: tuple[int, ...]) -> Any:
        values = plain(group, name, sample, shape)
        return values + np.float32([10, 0]) if group == "baseline" and shape == (2,) else values

    experiments = {
        "plain": MAP,
        "wide": {**MAP, "precision": {**PRECISION, "half_width": 1.7}},
        "ratio": {**MAP, "precision": {**PRECISION, "half_width": 0.22, "by": "recovery"}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tests.synthetic, "sample_values", apart)
        task = {"name": "maze", "mazes": 13, "pairs": ["red/blue", "red/any"]}
        assert sweep(plan_of(experiments=experiments, task=task), path).failed == 0
    compute_effects(path, replicates=50)
    return path


def effects_of(store: Path, name: str) -> xr.Dataset:
    return open_effects(store)[name].to_dataset().load()


def by_hand(store: Path, name: str, pair: str) -> tuple[Any, Any]:
    """Differences and values above the corrupted run, and the gap, as one row a prompt; pairs alternate."""
    found = arrays_of(store)
    baseline = found["baseline/goal_evidence"].astype(np.float64)
    above = found[f"{name}/goal_evidence"].astype(np.float64).reshape(26, -1) - baseline[:, 1:]
    gap = np.broadcast_to(baseline[:, :1] - baseline[:, 1:], above.shape)
    both = np.where(np.isnan(above), np.nan, gap)
    rows = {"red/blue": slice(0, None, 2), "red/any": slice(1, None, 2)}
    if pair == "all":
        return (above[::2] + above[1::2]) / 2, (both[::2] + both[1::2]) / 2
    return above[rows[pair]], both[rows[pair]]


PAIRS = ("all", "red/blue", "red/any")


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        "{}",
        '{"by": "difference", "prompts": "x"}',
        '{"by": "difference", "prompts": []}',
        '{"by": "difference", "prompts": [[8, 8]]}',
        '{"by": "difference", "prompts": [[8, 16], [8]]}',
        '{"by": "difference", "prompts": [[8, 9000000000]]}',
    ],
)
def test_attributes_that_tell_no_looks_are_refused(text):
    with pytest.raises(ValueError, match="the attribute precision"):
        looks_of({"precision": text})


class TestMaps:
    @pytest.mark.parametrize("pair", PAIRS)
    @pytest.mark.parametrize("name", ["wide", "ratio"])
    def test_intervals_are_those_of_the_looks(self, name, pair, store):
        effects = effects_of(store, name).sel(pair=pair)
        above, gap = by_hand(store, name, pair)
        level = spread_level(0.95, [(6, 9, 13)]) if name == "wide" else union_level(0.95, 3)
        mean, ratio = mean_bounds(above, level=level), ratio_bounds(above, gap, level=level)
        for estimand, bounds in (("difference", mean), ("recovery", ratio)):
            for part, values in (("", bounds.value), ("_low", bounds.low), ("_high", bounds.high)):
                found = effects[f"goal_evidence_{estimand}{part}"].values.ravel()
                np.testing.assert_allclose(found, values, rtol=1e-9, atol=1e-12)
        assert np.array_equal(effects["goal_evidence_n"].values.ravel(), np.isfinite(above).sum(axis=0))
        p = p_values(above, looks=3)
        np.testing.assert_allclose(effects["goal_evidence_p_fwer"].values.ravel(), holm(p), rtol=1e-9)

    @pytest.mark.parametrize(
        ("name", "estimand", "half_width"), [("wide", "difference", 1.7), ("ratio", "recovery", 0.22)]
    )
    def test_a_cell_that_stopped_is_as_narrow_as_was_asked_in_every_pair_kind(self, name, estimand, half_width, store):
        effects, stopped = effects_of(store, name), arrays_of(store)[f"{name}/stopped"][-1] == 1
        widths = effects[f"goal_evidence_{estimand}_high"] - effects[f"goal_evidence_{estimand}_low"]
        assert stopped.any()
        assert not stopped.all()
        assert (widths.values[:, stopped] / 2 <= half_width + 1e-9).all()
        open_ = effects["goal_evidence_n"].sel(pair="all").values[~stopped]
        assert (open_ == 13).all()

    def test_no_stopped_cell_counts_as_failed(self, store):
        for name in ("wide", "ratio", "plain"):
            assert not effects_of(store, name)["goal_evidence_failed"].any()

    def test_say_how_they_were_estimated(self, store):
        attrs = effects_of(store, "wide").attrs
        looks = looks_of(attrs)
        assert looks is not None
        assert looks.count == attrs["looks"] == 3
        assert looks.level("prompt", 0.95) == attrs["level_at_look"] == spread_level(0.95, [(6, 9, 13)])
        assert looks.level("sample", 0.95) == union_level(0.95, 3)
        assert attrs["method_interval"].startswith("Student t over prompts, at each of 3 looks")
        assert "cells stop for their spread" in attrs["method_interval"]
        assert "union bound" in effects_of(store, "ratio").attrs["method_interval"]
        assert "Fieller" in attrs["method_interval"]
        assert "times the 3 looks" in attrs["method_p_fwer"]
        assert attrs["method_p_fwer"].endswith("adjusted by Holm over all cells of one pair kind and metric")
        assert effects_of(store, "wide")["goal_evidence_p_fwer"].attrs["long_name"].startswith("family-wise (Holm)")

    def test_of_other_experiments_stay_bootstrapped(self, store):
        effects = effects_of(store, "plain")
        assert looks_of(effects.attrs) is None
        assert effects.attrs["method_interval"].startswith("percentile bootstrap over prompts")
        assert effects["goal_evidence_p_fwer"].attrs["long_name"].startswith("family-wise (max-T)")

    def test_the_report_tells_both_methods_apart(self, store, tmp_path):
        write_report(store, tmp_path)
        page = (tmp_path / "report.html").read_text()
        for text in ("p (max-T)", "p (Holm)", "p (Holm), experiments in rounds", "interval, experiments in rounds"):
            assert text in page
        assert "Student t over prompts, at each of 3 looks" in page
