"""Choosing cells by their estimates, and judging that choice: pure functions, properties and planted answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import spearmanr

from pipeline.effects.agreement import compare, weighted_ranks, weights
from pipeline.screening import Screen, mean_over_samples, select, share_of_step


def screen_of(top: float, random: float = 0.0, seed: int = 0) -> Screen:
    return Screen(top=top, metric="clean_projection", random=random, seed=seed)


MEANS = np.random.default_rng(3).normal(size=(10, 4, 5))


def test_the_largest_in_absolute_value_are_chosen():
    chosen = select(MEANS, screen_of(0.1))
    assert chosen.exact.sum() == 20
    assert not chosen.drawn.any()
    assert np.abs(MEANS[chosen.exact]).min() > np.abs(MEANS[~chosen.exact]).max()


def test_random_cells_come_from_the_others_and_from_the_seed_alone():
    first, again, other = (select(MEANS, screen_of(0.1, 0.05, seed)) for seed in (1, 1, 2))
    top = select(MEANS, screen_of(0.1)).exact
    assert first.drawn.sum() == 10
    assert not (first.drawn & top).any()
    assert (first.exact == (first.drawn | top)).all()
    assert (first.drawn == again.drawn).all()
    assert (first.drawn != other.drawn).any()


def test_cells_without_an_estimate_rank_last():
    means = np.array([np.nan, 0.0, -3.0, np.inf, 1.0])
    assert list(np.flatnonzero(select(means, screen_of(0.4)).exact)) == [2, 4]


def test_a_grid_of_one_cell_is_verified():
    assert select(np.array(0.5), screen_of(0.01)).exact


@given(top=st.floats(0.001, 1), random=st.floats(0, 1), cells=st.integers(1, 300))
def test_as_many_are_chosen_as_the_plan_counts(top, random, cells):
    screen = screen_of(top, random)
    chosen = select(np.zeros(cells), screen)
    assert chosen.exact.sum() == screen.verified_cells(cells)
    assert chosen.drawn.sum() == screen.random_cells(cells)


def test_shares_are_not_rounded_up_by_binary_fractions():
    assert screen_of(0.07).top_cells(100) == 7


@pytest.mark.parametrize("wrong", [{"top": 0.0}, {"top": 1.1}, {"random": -0.1}, {"seed": -1}], ids=str)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Screen(**{"top": 0.1, "metric": "clean_projection", **wrong})


def test_the_mean_leaves_out_what_is_not_finite():
    found = mean_over_samples(np.array(row, dtype=np.float32) for row in ([1, np.nan, np.nan], [3, 5, np.inf]))
    np.testing.assert_array_equal(found, [2, 5, np.nan])


def test_share_of_a_flow_step_is_its_part_of_the_noise_level():
    flow = [(0.0, 1.0), (0.4, 0.6), (0.7, 0.3), (1.0, 0.0)]
    assert [share_of_step(flow, s) for s in range(3)] == pytest.approx([0.4, 0.5, 1.0])


def test_share_of_a_step_is_the_slope_of_the_solver():
    """Of variance-preserving levels, from the deterministic step itself."""
    levels, x = [(np.cos(a), np.sin(a)) for a in (1.2, 0.7)], 0.37

    def stepped(x0: float) -> float:
        (alpha, sigma), (next_alpha, next_sigma) = levels
        return next_alpha * x0 + next_sigma * (x - alpha * x0) / sigma

    assert share_of_step(levels, 0) == pytest.approx(stepped(1.5) - stepped(0.5))


def test_ranks_of_equal_weights_are_ordinary_ranks():
    values = np.array([3.0, 1.0, 2.0, 2.0])
    np.testing.assert_allclose(weighted_ranks(values, np.ones(4)) + 0.5, [4, 1, 2.5, 2.5])


def test_agreement_over_all_cells_is_spearman():
    generator = np.random.default_rng(0)
    estimate = generator.normal(size=50)
    difference = estimate + generator.normal(size=50)
    found = compare(estimate, difference, np.ones(50), np.zeros(50, dtype=bool))
    assert found["spearman"] == pytest.approx(spearmanr(estimate, difference)[0])
    assert found["recall"] == pytest.approx(1.0)


def test_without_random_cells_nothing_is_claimed_about_those_unseen():
    exact = np.arange(20) < 4
    weight = weights(exact, np.zeros(20, dtype=bool))
    found = compare(MEANS.ravel()[:20], MEANS.ravel()[:20], weight, np.zeros(20, dtype=bool))
    assert found == {"spearman": None, "recall": None}


def test_a_random_cell_stands_for_those_left_out():
    exact, drawn = np.arange(20) < 6, (np.arange(20) >= 4) & (np.arange(20) < 6)
    np.testing.assert_array_equal(weights(exact, drawn)[:7], [1, 1, 1, 1, 8, 8, 0])


@pytest.mark.parametrize("noise", [0.6, 1.0, 3.0])
def test_agreement_of_verified_cells_is_that_of_the_whole_grid(noise):
    """Unbiased where the naive numbers over verified cells are not, on average over draws."""
    generator = np.random.default_rng(7)
    estimate = generator.normal(size=2000)
    difference = estimate + noise * generator.normal(size=2000)
    top = int(0.1 * 2000)
    truth = {
        "spearman": spearmanr(estimate, difference)[0],
        "recall": len({*np.argsort(-np.abs(estimate))[:top]} & {*np.argsort(-np.abs(difference))[:top]}) / top,
    }
    found = []
    for seed in range(30):
        chosen = select(estimate, screen_of(0.1, 0.05, seed))
        known = np.where(chosen.exact, difference, np.nan)
        found.append(compare(estimate, known, weights(chosen.exact, chosen.drawn), chosen.drawn))
    for name, value in truth.items():
        assert np.mean([f[name] for f in found]) == pytest.approx(value, abs=0.04)
    naive = spearmanr(estimate[chosen.exact], difference[chosen.exact])[0]
    assert abs(naive - truth["spearman"]) > 0.04


@given(st.permutations(range(20)))
def test_recall_does_not_depend_on_the_order_of_cells_that_tie(order):
    """Where several cells share the border's size, each counts with the share that belongs to the strongest."""
    order = np.array(order)
    difference, drawn = np.repeat([3.0, 1.0], 10), np.arange(20) >= 5
    found = compare(np.arange(20.0)[order], difference[order], np.ones(20), drawn[order])
    assert found["recall"] == pytest.approx(0.5)


def test_effects_that_are_all_one_size_have_no_recall():
    assert compare(np.arange(20.0), np.zeros(20), np.ones(20), np.arange(20) >= 5)["recall"] is None
