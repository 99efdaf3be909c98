"""The algebra of mergeable statistics: chunked equals whole, merging is associative and commutative."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from pipeline.effects.state import GroupedMoments, Moments

FINITE = st.floats(-1e3, 1e3, width=32)
VALUES = hnp.arrays(np.float64, st.tuples(st.integers(0, 12), st.just(3)), elements=FINITE | st.just(float("nan")))
PROMPTS = ("a", "b", "c")


def assert_same(a: Moments, b: Moments) -> None:
    """Counts exactly, sums up to float64 rounding of values up to 1000."""
    np.testing.assert_array_equal(a.n, b.n)
    np.testing.assert_array_equal(a.missing, b.missing)
    np.testing.assert_allclose(a.total, b.total, rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(a.m2, b.m2, rtol=1e-9, atol=1e-5)


def of_rows(values: NDArray[np.float64]) -> GroupedMoments:
    """Assign rows to prompts in turn, each with its own pair."""
    return GroupedMoments.of(values, keys_of(len(values)))


def keys_of(rows: int, start: int = 0) -> list[tuple[str, str]]:
    return [(f"pair-{i % 2}", PROMPTS[i % 3]) for i in range(start, start + rows)]


@given(VALUES, st.lists(st.integers(0, 12), max_size=4))
@settings(max_examples=60, deadline=None)
def test_chunked_equals_whole(values: NDArray[np.float64], cuts: list[int]) -> None:
    chunks = np.split(values, sorted(min(c, len(values)) for c in cuts))
    merged = reduce(Moments.merge, (Moments.of(c) for c in chunks), Moments.zero((3,)))
    assert_same(merged, Moments.of(values))


@given(VALUES, VALUES, VALUES)
@settings(max_examples=60, deadline=None)
def test_merge_is_associative_and_commutative(
    a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64]
) -> None:
    x, y, z = Moments.of(a), Moments.of(b), Moments.of(c)
    assert_same(x.merge(y).merge(z), x.merge(y.merge(z)))
    assert_same(x.merge(y), y.merge(x))


@given(VALUES)
@settings(max_examples=30, deadline=None)
def test_zero_is_neutral(values: NDArray[np.float64]) -> None:
    state = Moments.of(values)
    assert_same(state.merge(Moments.zero((3,))), state)
    assert_same(Moments.zero((3,)).merge(state), state)


@given(VALUES, st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_grouped_chunks_equal_whole_whatever_the_order(values: NDArray[np.float64], cut: int) -> None:
    cut = min(cut, len(values))
    first = GroupedMoments.of(values[:cut], keys_of(cut))
    second = GroupedMoments.of(values[cut:], keys_of(len(values) - cut, start=cut))
    whole = of_rows(values)
    for merged in (first.merge(second), second.merge(first)):
        assert merged.keys == whole.keys
        assert_same(merged.moments, whole.moments)


def test_mean_and_sd_match_numpy() -> None:
    values = np.random.default_rng(0).normal(5, 2, (50, 4))
    state = Moments.of(values)
    np.testing.assert_allclose(state.mean, values.mean(axis=0))
    np.testing.assert_allclose(state.sd, values.std(axis=0, ddof=1))


def test_missing_values_are_left_out_but_counted() -> None:
    state = Moments.of([[1.0, np.nan], [3.0, np.inf], [np.nan, np.nan]])
    assert state.n.tolist() == [2, 0]
    assert state.missing.tolist() == [1, 3]
    assert state.mean[0] == 2.0
    assert np.isnan(state.mean[1])


def test_sd_of_one_value_is_unknown() -> None:
    assert np.isnan(Moments.of([[2.0]]).sd[0])


def test_float32_input_accumulates_in_float64() -> None:
    values = np.full((100_001, 1), 1e-4, np.float32)
    values[0] = 1e4
    assert Moments.of(values).total[0] == pytest.approx(1e4 + 1e5 * float(np.float32(1e-4)), rel=1e-12)


def test_a_large_offset_does_not_drown_the_spread() -> None:
    values = 1e8 + np.random.default_rng(0).normal(0, 1, (64, 1))
    merged = reduce(Moments.merge, (Moments.of(c) for c in np.split(values, 8)))
    np.testing.assert_allclose(merged.sd, values.std(axis=0, ddof=1), rtol=1e-6)


def test_regroup_merges_pairs_of_a_prompt_and_drops_none() -> None:
    values = np.arange(12.0).reshape(6, 2)
    keys = [("x", "a"), ("x", "a"), ("y", "a"), ("x", "b"), ("y", "b"), ("y", "b")]
    grouped = GroupedMoments.of(values, keys)
    every = grouped.regroup(lambda k: (k[1],))
    assert every.keys == (("a",), ("b",))
    np.testing.assert_allclose(every.moments.mean, [values[:3].mean(axis=0), values[3:].mean(axis=0)])
    only_y = grouped.regroup(lambda k: (k[1],) if k[0] == "y" else None)
    np.testing.assert_allclose(only_y.moments.mean, [values[2], values[4:].mean(axis=0)])


def test_regroup_to_nothing_is_empty() -> None:
    empty = of_rows(np.ones((4, 2))).regroup(lambda _: None)
    assert empty.keys == ()
    assert empty.moments.mean.shape == (0, 2)


def test_rows_without_a_key_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows and keys differ in number: 3 and 2\. Give one key per row\."):
        GroupedMoments.of(np.ones((3, 1)), [("p", "a"), ("p", "b")])
