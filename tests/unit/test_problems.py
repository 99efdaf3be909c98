"""Other samples of a sweep: another problem, never the same run again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interventions.base import RunRef
from pipeline.problems import Problems
from pipeline.samples import Sample
from pipeline.tasks.maze import MazeTask


def samples(problems: int, pairs: int, seeds: int) -> list[Sample]:
    found: list[Sample] = []
    for problem in range(problems):
        for seed in range(seeds):
            for pair in range(pairs):
                found.append(
                    Sample(
                        index=len(found),
                        prompt=f"problem-{problem}",
                        seed=seed,
                        pair=f"pair-{pair}",
                        clean_prompt="a",
                        corrupted_prompt=f"b{pair}",
                    )
                )
    return found


@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9), st.data())
def test_a_neighbour_is_another_problem_with_the_same_pair_and_seed(problems, pairs, seeds, offset, data):
    given_ = samples(problems, pairs, seeds)
    i = data.draw(st.integers(0, len(given_) - 1))
    other = given_[Problems(given_).referred(RunRef("clean", sample=offset), i)]
    assert (other.pair, other.seed) == (given_[i].pair, given_[i].seed)
    assert (other.prompt == given_[i].prompt) == (offset % problems == 0)


@given(st.integers(1, 5), st.integers(1, 3), st.data())
def test_a_fixed_reference_is_the_same_problem_for_every_sample(problems, pairs, data):
    given_ = samples(problems, pairs, 1)
    reference = data.draw(st.integers(0, problems - 1))
    found = {
        given_[Problems(given_).referred(RunRef("clean", sample=reference, fixed=True), i)].prompt
        for i in range(len(given_))
    }
    assert found == {f"problem-{reference}"}


def test_a_reference_beyond_the_last_problem_is_refused():
    with pytest.raises(ValueError, match="beyond the 2 problems"):
        Problems(samples(2, 3, 1)).referred(RunRef("clean", sample=2, fixed=True), 0)


def test_mazes_with_several_pairs_are_neighbours_by_maze():
    """Samples next to each other share the maze: taking the next one would read the very same clean run."""
    given_ = MazeTask(mazes=3, pairs=("red/blue", "red/any")).samples()
    assert given_[0].prompt == given_[1].prompt
    assert Problems(given_).referred(RunRef("clean", sample=1), 0) == 2
    assert Problems(given_).referred(RunRef("clean", sample=1), 5) == 1
