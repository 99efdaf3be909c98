"""The symbolic scorer: only a walk scores as a walk, and doing nothing scores nothing."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.samples import Sample
from pipeline.tasks import maze_score
from pipeline.tasks import maze_world as world

INDICES = st.integers(0, 2**30)
GOALS = st.sampled_from(["red", "blue"])
LAST = world.FRAMES - 1


def cross_fade(video):
    ends = world.PALETTE[video[[0, -1]]].astype(np.float32)
    weights = np.linspace(0, 1, world.FRAMES)[:, None, None, None]
    return maze_score.classify((1 - weights) * ends[0] + weights * ends[1])


def straight_line(maze, goal):
    """Walk from the start to the goal along a row and a column, through whatever stands there."""
    (r0, c0), (r1, c1) = maze.start, getattr(maze, goal)
    rows = [(r, c0) for r in range(r0, r1, 1 if r1 > r0 else -1)]
    line = rows + [(r1, c) for c in range(c0, c1, 1 if c1 > c0 else -1)] + [(r1, c1)]
    video = np.repeat(world.first_frame(maze)[None], world.FRAMES, axis=0)
    for t in range(world.FRAMES):
        reached = round(t * (len(line) - 1) / LAST)
        for cell in line[:reached]:
            video[t][cell] = world.TRAIL
        video[t][line[reached]] = world.AGENT
    return video, line


DEGENERATE = {
    "middle frames reversed": (lambda v: v[[0, 4, 3, 2, 1, 5]], 0.4),
    "middle frames swapped": (lambda v: v[[0, 3, 4, 1, 2, 5]], 0.8),
    "time reversed": (lambda v: v[::-1], 0.4),
    "hard cut after the first frame": (lambda v: v[[0, 5, 5, 5, 5, 5]], 0.4),
    "hard cut in the middle": (lambda v: v[[0, 0, 0, 5, 5, 5]], 0.4),
    "hard cut before the last frame": (lambda v: v[[0, 0, 0, 0, 0, 5]], 0.2),
    "cross-fade": (cross_fade, 0.4),
    "static first frame": (lambda v: v[[0] * world.FRAMES], 0.0),
    "static last frame": (lambda v: v[[5] * world.FRAMES], 0.4),
    "all wall": (lambda v: np.full_like(v, world.WALL), 0.0),
    "all floor": (lambda v: np.full_like(v, world.FLOOR), 0.0),
    "noise": (lambda v: np.random.default_rng(0).integers(0, 6, v.shape).astype(np.uint8), 0.0),
}


@settings(max_examples=60, deadline=None)
@given(index=INDICES, goal=GOALS, balanced=st.sampled_from([None, True, False]))
def test_the_true_solution_has_every_mark(index, goal, balanced):
    maze = world.generate(index, balanced=balanced)
    score = maze_score.score(maze, world.solution(maze, goal))
    assert all(score.legal)
    assert all(score.ordered)
    assert score.walls_intact
    assert score.reached == score.answer == goal
    assert score.solved(goal)
    assert score.solved()
    assert not score.solved("blue" if goal == "red" else "red")
    assert score.trajectory == 1.0


@pytest.mark.parametrize("clip", DEGENERATE)
def test_a_degenerate_clip_scores_far_below_the_solution(clip):
    make, ceiling = DEGENERATE[clip]
    for index in range(25):
        maze = world.generate(index)
        for goal in ("red", "blue"):
            assert maze_score.score(maze, make(world.solution(maze, goal))).trajectory <= ceiling


@settings(max_examples=15, deadline=None)
@given(index=INDICES, goal=GOALS)
def test_every_other_order_of_the_frames_scores_less(index, goal):
    maze = world.generate(index)
    truth = world.solution(maze, goal)
    for order in permutations(range(1, world.FRAMES)):
        shuffled = truth[[0, *order]]
        if not np.array_equal(shuffled, truth):
            assert maze_score.score(maze, shuffled).trajectory < 1.0


def test_doing_nothing_is_legal_and_ordered_and_scores_zero():
    maze = world.generate(1)
    score = maze_score.score(maze, np.repeat(world.first_frame(maze)[None], world.FRAMES, axis=0))
    assert all(score.legal)
    assert all(score.ordered)
    assert score.trajectory == 0.0
    assert score.reached is None
    assert not score.solved()


def test_a_straight_line_through_the_walls_is_not_solved():
    crossings = 0
    for index in range(40):
        maze = world.generate(index)
        video, line = straight_line(maze, "red")
        if any(maze.walls[cell] for cell in line):
            crossings += 1
            score = maze_score.score(maze, video)
            assert score.reached == "red"
            assert not score.solved()
            assert not score.walls_intact
            assert score.trajectory < 1.0
    assert crossings > 10


def test_the_given_frame_is_not_judged():
    maze = world.generate(2)
    video = world.solution(maze, "blue")
    video[0] = world.WALL
    assert maze_score.score(maze, video).trajectory == 1.0


@pytest.fixture
def maze():
    """A maze whose red path has at least six cells."""
    return next(m for m in map(world.generate, range(100)) if len(m.red_path) >= 6)


def last_frame(maze, **changes):
    frame = world.solution(maze, "red")[-1]
    for cell, value in changes.values():
        frame[cell] = value
    return frame


def test_a_frame_without_the_start_in_its_trail_is_illegal(maze):
    assert maze_score.answer(maze, last_frame(maze, gap=(maze.start, world.FLOOR))) is None


def test_a_gap_in_the_trail_is_illegal(maze):
    assert maze_score.answer(maze, last_frame(maze, gap=(maze.red_path[2], world.FLOOR))) is None


def test_a_stray_mark_is_illegal(maze):
    free = [c for c in np.ndindex(5, 5) if not maze.walls[c] and c not in (*maze.red_path, maze.blue)]
    for cell in free:
        assert maze_score.answer(maze, last_frame(maze, stray=(cell, world.TRAIL))) is None


def test_two_agents_are_illegal_and_reach_nothing(maze):
    score = maze_score.score(maze, np.stack([last_frame(maze, second=(maze.start, world.AGENT))] * world.FRAMES))
    assert not any(score.legal[1:])
    assert score.reached is None


def test_a_missing_agent_reaches_nothing(maze):
    assert maze_score.answer(maze, last_frame(maze, gone=(maze.red, world.TRAIL))) is None


@pytest.mark.parametrize("became", [world.FLOOR, world.RED, world.TRAIL])
def test_a_changed_other_goal_is_illegal(maze, became):
    assert maze_score.answer(maze, last_frame(maze, gone=(maze.blue, became))) is None


def test_an_invented_goal_is_illegal(maze):
    free = next(c for c in np.ndindex(5, 5) if not maze.walls[c] and c not in (*maze.red_path, maze.blue))
    assert maze_score.answer(maze, last_frame(maze, extra=(free, world.RED))) is None


def test_a_removed_wall_is_illegal(maze):
    wall = tuple(np.argwhere(maze.walls)[0])
    frame = last_frame(maze, broken=(wall, world.FLOOR))
    assert maze_score.answer(maze, frame) is None
    video = world.solution(maze, "red")
    video[2] = frame
    assert not maze_score.score(maze, video).walls_intact


def test_a_wall_of_a_middle_frame_costs_that_frame_alone(maze):
    video = world.solution(maze, "red")
    video[3][tuple(np.argwhere(maze.walls)[0])] = world.FLOOR
    score = maze_score.score(maze, video)
    assert score.legal == (True, True, True, False, True, True)
    assert score.trajectory == pytest.approx(0.8)
    assert score.solved("red")


def test_changing_the_goal_on_the_way_breaks_order():
    maze = next(m for m in map(world.generate, range(100)) if m.red_path[1] != m.blue_path[1])
    red, blue = world.solution(maze, "red"), world.solution(maze, "blue")
    score = maze_score.score(maze, np.concatenate([red[:3], blue[3:]]))
    assert all(score.legal)
    assert score.ordered == (True, True, False, True, True)
    assert score.solved("blue")
    assert score.trajectory < 1.0


def test_answer_of_a_frame_equals_answer_of_the_video():
    for index in range(10):
        maze = world.generate(index)
        for video in (world.solution(maze, "red"), world.solution(maze, "blue"), world.solution(maze, "red")[::-1]):
            assert maze_score.answer(maze, video[-1]) == maze_score.score(maze, video).answer


def test_a_video_of_the_wrong_shape_is_refused(maze):
    with pytest.raises(ValueError, match=r"a maze video has shape \(6, 5, 5\), got \(2, 6, 5, 5\)"):
        maze_score.score(maze, np.zeros((2, 6, 5, 5), dtype=np.uint8))


@settings(max_examples=25, deadline=None)
@given(index=INDICES, seed=st.integers(0, 1000))
def test_classification_survives_noise_of_a_tenth_of_the_range(index, seed):
    video = world.solution(world.generate(index), "red")
    noise = np.random.default_rng(seed).uniform(-25, 25, (2, *video.shape, 3))
    classes = maze_score.classify(world.PALETTE[video] + noise)
    assert classes.dtype == np.uint8
    assert np.array_equal(classes, np.stack([video, video]))


def test_a_blend_of_both_answers_leans_to_one_and_is_not_decoded_as_it():
    maze = world.generate(0)
    red, blue = (world.PALETTE[world.solution(maze, goal)].astype(np.float32) for goal in ("red", "blue"))
    weak, firm = 0.55 * red + 0.45 * blue, 0.9 * red + 0.1 * blue
    assert maze_score.answer(maze, maze_score.lean(weak)[-1]) == "red"
    assert maze_score.answer(maze, maze_score.classify(weak)[-1]) is None
    assert (maze_score.classify(weak)[-1] == maze_score.UNCLEAR).any()
    assert maze_score.answer(maze, maze_score.classify(firm)[-1]) == "red"
    assert (maze_score.classify(red) == maze_score.lean(red)).all()


def test_an_unclear_pixel_anywhere_makes_a_frame_illegal():
    maze = world.generate(0)
    video = world.solution(maze, "red")
    floor = np.argwhere(video[-1] == world.FLOOR)[0]
    video[-1][tuple(floor)] = maze_score.UNCLEAR
    assert maze_score.score(maze, video).answer is None


def test_a_video_that_is_not_finite_shows_no_class():
    assert (maze_score.classify(np.full((2, 3), np.nan)) == maze_score.UNCLEAR).all()


def sample(**parameters):
    return Sample(index=0, prompt="maze-00004", seed=0, pair="red/blue", clean_prompt="red", corrupted_prompt="blue",
                  parameters=parameters)  # fmt: skip


@pytest.mark.parametrize(("word", "balanced"), [("yes", True), ("no", False), ("either", None)])
def test_the_maze_of_a_sample_is_the_held_out_maze_it_names(word, balanced):
    found, expected = maze_score.maze_of(sample(maze=4, balanced=word)), world.generate(4, balanced=balanced)
    assert np.array_equal(world.first_frame(found), world.first_frame(expected))
    assert maze_score.maze_of(sample(maze=4, balanced=word)) is found


def test_an_unknown_balance_is_refused():
    with pytest.raises(ValueError, match="unknown value of balanced: 'maybe'"):
        maze_score.maze_of(sample(maze=4, balanced="maybe"))
