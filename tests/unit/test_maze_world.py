"""The maze world: same mazes everywhere, a split that symmetry cannot leak through, and true solutions."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tasks import maze_world as world

INDICES = st.integers(0, 2**40)
BALANCED = st.sampled_from([None, True, False])


def images(maze):
    """All 16 images of a maze: rotations and reflections, each with the goals as they are and exchanged."""
    marks = np.zeros((4, world.SIZE, world.SIZE), dtype=np.uint8)
    for layer, cells in enumerate((np.argwhere(maze.walls), [maze.start], [maze.red], [maze.blue])):
        for cell in cells:
            marks[layer][tuple(cell)] = 1
    for k in range(4):
        for flip in (False, True):
            turned = np.rot90(marks, k, axes=(1, 2))
            turned = turned[:, :, ::-1] if flip else turned
            start, red, blue = (tuple(int(x) for x in np.argwhere(m)[0]) for m in turned[1:])
            for goals in ((red, blue), (blue, red)):
                yield turned[0].astype(bool), start, goals


def count_shortest_walks(floor, start, goal, moves):
    """Count walks of at most ``moves`` moves by brute force: an independent check of the breadth-first search."""
    ways = {start: 1}
    for done in range(moves + 1):
        if goal in ways:
            return done, ways[goal]
        following: dict[tuple[int, int], int] = {}
        for (r, c), n in ways.items():
            for cell in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                if 0 <= cell[0] < world.SIZE and 0 <= cell[1] < world.SIZE and floor[cell]:
                    following[cell] = following.get(cell, 0) + n
        ways = following
    return None


@settings(max_examples=60, deadline=None)
@given(index=INDICES, balanced=BALANCED, split=st.sampled_from(["train", "held_out"]))
def test_a_maze_has_the_promised_properties(index, balanced, split):
    maze = world.generate(index, split=split, balanced=balanced)
    assert balanced in (None, maze.balanced)
    assert maze.start != maze.red != maze.blue != maze.start
    for goal in ("red", "blue"):
        path = maze.path(goal)
        assert path[0] == maze.start
        assert path[-1] == getattr(maze, goal)
        assert len(path) >= world.MIN_PATH_CELLS
        assert not any(maze.walls[cell] for cell in path)
        assert all(abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1 for a, b in pairwise(path))
        assert count_shortest_walks(~maze.walls, maze.start, path[-1], 25) == (len(path) - 1, 1)
    assert maze.blue not in maze.red_path
    assert maze.red not in maze.blue_path


@settings(max_examples=20, deadline=None)
@given(index=INDICES, balanced=BALANCED)
def test_the_same_arguments_give_the_same_maze(index, balanced):
    once, again = (world.generate(index, balanced=balanced) for _ in range(2))
    assert np.array_equal(world.first_frame(once), world.first_frame(again))


def test_mazes_are_the_ones_that_published_figures_used():
    frames = [world.first_frame(world.generate(i, balanced=b)) for b in (None, True, False) for i in range(20)]
    digest = hashlib.sha256(np.stack(frames).tobytes()).hexdigest()
    assert digest == "e7023fcedbaea5c1a4b8803df1e2af9e0e2c708407859ba0bc1415f51714e945", (
        "a changed stream of mazes invalidates weights, cards and stores"
    )


@settings(max_examples=40, deadline=None)
@given(index=INDICES, split=st.sampled_from(["train", "held_out"]))
def test_every_image_of_a_maze_is_in_its_split(index, split):
    maze = world.generate(index, split=split)
    assert {world.split_of(*image) for image in images(maze)} == {split}


@settings(max_examples=20, deadline=None)
@given(index=INDICES)
def test_all_images_share_their_canonical_key(index):
    assert len({world.canonical_key(*image) for image in images(world.generate(index))}) == 1


def test_canonical_keys_tell_different_mazes_apart():
    mazes = [world.generate(i) for i in range(200)]
    keys = {world.canonical_key(m.walls, m.start, (m.red, m.blue)) for m in mazes}
    assert len(keys) > 195


def test_about_one_maze_class_in_eight_is_held_out():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(800):
        cells = [(int(r), int(c)) for r, c in np.stack(divmod(rng.permutation(25)[:3], 5), axis=1)]
        walls = rng.random((world.SIZE, world.SIZE)) < world.WALL_SHARE
        held += world.split_of(walls, cells[0], (cells[1], cells[2])) == "held_out"
    assert 60 <= held <= 140


def test_the_streams_of_the_two_splits_and_of_the_balances_differ():
    frames = {
        world.first_frame(world.generate(7, split=split, balanced=balanced)).tobytes()
        for split in ("train", "held_out")
        for balanced in (None, True, False)
    }
    assert len(frames) == 6


def test_breadth_first_search_counts_ways_and_marks_what_it_cannot_reach():
    floor = np.ones((world.SIZE, world.SIZE), dtype=bool)
    floor[:, 3] = False
    distance, ways, parent = world.shortest_paths(floor, (0, 0))
    assert distance[2 * world.SIZE + 2] == 4
    assert ways[2 * world.SIZE + 2] == 6
    assert distance[4] == -1
    assert parent[0] == -1


@pytest.mark.parametrize("goal", ["red", "blue"])
@pytest.mark.parametrize("index", range(12))
def test_a_solution_walks_the_path_at_a_steady_pace(index, goal):
    maze = world.generate(index)
    video, path = world.solution(maze, goal), maze.path(goal)
    assert np.array_equal(video[0], world.first_frame(maze))
    positions = []
    for frame in video:
        (agent,) = np.argwhere(frame == world.AGENT).tolist()
        positions.append(path.index(tuple(agent)))
        assert {tuple(c) for c in np.argwhere(frame == world.TRAIL).tolist()} == set(path[: positions[-1]])
        assert np.array_equal(frame == world.WALL, maze.walls)
    moves = len(path) - 1
    assert positions == [round(t * moves / (world.FRAMES - 1)) for t in range(world.FRAMES)]
    assert positions[-1] == moves


def test_a_solution_leaves_the_other_goal_standing():
    maze = world.generate(3)
    assert (world.solution(maze, "red")[:, *maze.blue] == world.BLUE).all()
    assert (world.solution(maze, "blue")[:, *maze.red] == world.RED).all()


def test_drawing_repeats_each_cell_and_keeps_leading_axes():
    video = world.solution(world.generate(0), "red")
    rgb = world.draw(video, pixels_per_cell=3)
    assert rgb.shape == (world.FRAMES, 15, 15, 3)
    assert rgb.dtype == np.uint8
    assert np.array_equal(rgb[:, 1::3, 1::3], world.PALETTE[video])
    assert np.array_equal(rgb[:, ::3, ::3], rgb[:, 2::3, 2::3])


def test_palette_colours_are_far_apart():
    colours = world.PALETTE.astype(float)
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert distances[~np.eye(len(colours), dtype=bool)].min() > 150
    assert len(colours) == len(world.CLASS_NAMES)
