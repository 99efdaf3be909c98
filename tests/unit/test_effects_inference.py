"""Bootstrap, sign flips and corrections against slow reference computations and known answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import stats

from pipeline.effects import inference
from pipeline.effects.inference import (
    benjamini_hochberg,
    bootstrap_mean,
    bootstrap_ratio,
    max_t,
    resample_counts,
    sign_flips,
)

LEVEL = 0.95
NAN = float("nan")


def draws(units: int = 12, cells: int = 5, *, shift: float = 0.0, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(shift, 1, (units, cells))


def counts(units: int, replicates: int = 800, seed: int = 3) -> NDArray[np.float64]:
    return resample_counts(units, replicates=replicates, seed=seed)


def replicate_rows(row: NDArray[np.float64]) -> list[int]:
    """Spell out one replicate of a count matrix as unit indices."""
    return [i for i, k in enumerate(row) for _ in range(int(k))]


def test_every_replicate_draws_as_many_units_as_there_are() -> None:
    drawn = counts(7)
    assert (drawn.sum(axis=1) == 7).all()
    assert drawn.mean() == pytest.approx(1.0)


def test_resampling_is_seeded() -> None:
    np.testing.assert_array_equal(counts(5, seed=1), counts(5, seed=1))
    assert (counts(5, seed=1) != counts(5, seed=2)).any()


def test_nothing_to_resample_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to resample: 0 units, 10 replicates"):
        resample_counts(0, replicates=10, seed=0)


def test_mean_interval_equals_a_resampling_loop() -> None:
    values, drawn = draws(), counts(12)
    means = np.array([values[replicate_rows(row)].mean(axis=0) for row in drawn])
    found = bootstrap_mean(values, drawn, level=LEVEL)
    np.testing.assert_allclose(found.value, values.mean(axis=0))
    np.testing.assert_allclose(found.low, np.quantile(means, 0.025, axis=0))
    np.testing.assert_allclose(found.high, np.quantile(means, 0.975, axis=0))


def test_missing_units_weigh_nothing() -> None:
    values, drawn = draws(), counts(12)
    values[[1, 4], 0] = NAN
    means = [np.nanmean(values[replicate_rows(row), 0]) for row in drawn]
    found = bootstrap_mean(values, drawn, level=LEVEL)
    assert found.value[0] == pytest.approx(np.nanmean(values[:, 0]))
    assert found.low[0] == pytest.approx(np.quantile(means, 0.025))
    complete = bootstrap_mean(values[:, 1:], drawn, level=LEVEL)
    np.testing.assert_array_equal(found.low[1:], complete.low)


def test_ratio_is_a_ratio_of_means_resampled_together() -> None:
    top, bottom, drawn = draws(seed=1), draws(shift=8, seed=2), counts(12)
    ratios = np.array([top[i].sum(axis=0) / bottom[i].sum(axis=0) for i in map(replicate_rows, drawn)])
    found = bootstrap_ratio(top, bottom, drawn, level=LEVEL)
    np.testing.assert_allclose(found.value, top.sum(axis=0) / bottom.sum(axis=0))
    np.testing.assert_allclose(found.high, np.quantile(ratios, 0.975, axis=0))


def test_ratio_of_proportional_values_has_no_width() -> None:
    bottom = draws(shift=5)
    found = bootstrap_ratio(0.3 * bottom, bottom, counts(12), level=LEVEL)
    for bound in (found.value, found.low, found.high):
        np.testing.assert_allclose(bound, 0.3)


def test_ratio_is_undefined_where_the_runs_agree() -> None:
    bottom = np.array([[1e-8, 1.0], [-1e-8, 1.0], [1e-8, 1.0]])
    found = bootstrap_ratio(np.ones((3, 2)), bottom, counts(3), level=LEVEL)
    assert np.isnan([found.value[0], found.low[0], found.high[0]]).all()
    assert found.value[1] == 1.0


def test_ratio_leaves_a_unit_out_of_both_sides() -> None:
    top, bottom = np.array([[1.0], [NAN], [3.0]]), np.array([[2.0], [100.0], [2.0]])
    assert bootstrap_ratio(top, bottom, counts(3), level=LEVEL).value[0] == 1.0


@pytest.mark.parametrize("values", [[[NAN], [NAN]], [[1.0], [NAN]]], ids=["no unit", "one unit"])
def test_too_few_units_give_no_interval(values: list[list[float]]) -> None:
    found = bootstrap_mean(np.array(values), counts(2), level=LEVEL)
    assert np.isnan([found.low[0], found.high[0]]).all()


def test_one_unit_still_has_an_estimate() -> None:
    assert bootstrap_mean(np.array([[1.5], [NAN]]), counts(2), level=LEVEL).value[0] == 1.5


def test_coverage_is_near_what_the_docstring_says() -> None:
    """Percentile intervals of 8 normal values cover 86 to 92 %, of 20 values 91 to 95 %."""
    for units, low, high in ((8, 0.86, 0.92), (20, 0.91, 0.95)):
        found = bootstrap_mean(draws(units, 4000, seed=5), counts(units, 400), level=LEVEL)
        assert low < ((found.low < 0) & (found.high > 0)).mean() < high


def test_a_higher_level_is_wider() -> None:
    values, drawn = draws(), counts(12)
    narrow, wide = (bootstrap_mean(values, drawn, level=level) for level in (0.5, 0.99))
    assert (wide.low < narrow.low).all()
    assert (wide.high > narrow.high).all()


def test_all_sign_patterns_give_the_exact_p() -> None:
    values = draws(8, shift=0.7)
    expected = stats.permutation_test(
        (values,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=np.inf, axis=0
    )
    found = sign_flips(values, replicates=256, seed=0)
    np.testing.assert_allclose(found.p, expected.pvalue)
    assert found.p.min() >= 2 / 256


def test_random_patterns_approach_the_exact_p() -> None:
    values = draws(12, shift=0.4)
    exact = sign_flips(values, replicates=4096, seed=0).p
    np.testing.assert_allclose(sign_flips(values, replicates=4000, seed=0).p, exact, atol=0.03)


def test_random_patterns_never_give_zero() -> None:
    p = sign_flips(np.full((30, 1), 1.0), replicates=99, seed=0).p
    assert p[0] == pytest.approx(1 / 100)


def test_no_effect_at_all_has_p_one() -> None:
    assert sign_flips(np.zeros((8, 2)), replicates=256, seed=0).p.tolist() == [1.0, 1.0]


def test_missing_units_do_not_enter_the_test() -> None:
    values = draws(7, 2, shift=1)
    padded = np.vstack([values, [[NAN, NAN]]])
    a, b = (sign_flips(v, replicates=256, seed=0) for v in (values, padded))
    np.testing.assert_allclose(a.p, b.p)
    np.testing.assert_allclose(a.statistic, b.statistic)


def test_a_cell_without_values_has_no_p() -> None:
    found = sign_flips(np.array([[NAN, 1.0], [NAN, 2.0]]), replicates=16, seed=0)
    assert np.isnan(found.p[0])
    assert np.isnan(max_t(found.statistic, found.largest)[0])
    assert found.p[1] == 0.5


def test_max_t_joins_over_blocks_of_cells() -> None:
    values = draws(8, 9, shift=0.5)
    whole = sign_flips(values, replicates=256, seed=0)
    blocks = [sign_flips(values[:, cut], replicates=256, seed=0) for cut in (slice(0, 4), slice(4, 9))]
    joined = max_t(np.concatenate([b.statistic for b in blocks]), np.max([b.largest for b in blocks], axis=0))
    np.testing.assert_allclose(joined, max_t(whole.statistic, whole.largest))


def test_max_t_is_at_least_the_plain_p_and_equals_it_for_one_cell() -> None:
    values = draws(8, 9, shift=0.5)
    found = sign_flips(values, replicates=256, seed=0)
    assert (max_t(found.statistic, found.largest) >= found.p - 1e-12).all()
    one = sign_flips(values[:, :1], replicates=256, seed=0)
    np.testing.assert_allclose(max_t(one.statistic, one.largest), one.p)


def test_max_t_keeps_the_family_wise_error() -> None:
    """Under the null, at most about 5 % of maps hold a cell at 0.05."""
    wrong = 0
    for seed in range(300):
        found = sign_flips(draws(8, 20, seed=seed), replicates=256, seed=0)
        wrong += bool((max_t(found.statistic, found.largest) <= 0.05).any())
    assert wrong / 300 < 0.09


def test_max_t_finds_what_fdr_cannot_with_few_units() -> None:
    values = draws(8, 200, seed=4)
    values[:, 0] = 10 + 0.1 * values[:, 0]
    found = sign_flips(values, replicates=256, seed=0)
    assert max_t(found.statistic, found.largest)[0] <= 0.05
    assert benjamini_hochberg(found.p)[0] > 0.05


def test_fdr_matches_scipy_and_keeps_the_shape() -> None:
    p = np.random.default_rng(0).uniform(0, 1, (4, 6)) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p.ravel()).reshape(4, 6))


def test_fdr_passes_missing_cells_by() -> None:
    p = np.array([0.01, NAN, 0.04])
    found = benjamini_hochberg(p)
    assert np.isnan(found[1])
    np.testing.assert_allclose(found[[0, 2]], benjamini_hochberg(p[[0, 2]]))


def test_fdr_of_nothing_is_nothing() -> None:
    assert np.isnan(benjamini_hochberg(np.array([NAN, NAN]))).all()


@given(hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(0, 1)))
@settings(max_examples=50, deadline=None)
def test_fdr_never_lowers_p_and_keeps_the_order(p: NDArray[np.float64]) -> None:
    adjusted = benjamini_hochberg(p)
    assert (adjusted >= p - 1e-15).all()
    assert (adjusted <= 1).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= -1e-15).all()


def test_the_caveats_are_stated() -> None:
    assert "covers less than its nominal level" in " ".join((inference.__doc__ or "").split())
