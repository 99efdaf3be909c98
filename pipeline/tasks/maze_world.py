"""The maze world: generation with symbolic truth, the solution as a grid of classes, and drawing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SIZE = 5
"""Cells along each side of a maze."""
FRAMES = 6
"""Latent frames of a video; frame 0 is given."""
PIXELS_PER_CELL = 16
WALL_SHARE = 0.28
MIN_PATH_CELLS = 4
"""Cells on a path, start and goal included, so that every problem needs at least three moves."""
HELD_OUT_SHARE = 8
"""One maze class in this many is held out of training."""

FLOOR, WALL, AGENT, TRAIL, RED, BLUE = range(6)
CLASS_NAMES = ("floor", "wall", "agent", "trail", "red", "blue")
PALETTE = np.array(
    [(250, 250, 245), (30, 32, 38), (20, 190, 70), (250, 205, 30), (225, 35, 40), (35, 70, 225)], dtype=np.uint8
)
"""RGB of each class, far apart so that decoding to the nearest colour is robust."""

Goal = Literal["red", "blue"]
Cell = tuple[int, int]
Split = Literal["train", "held_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Maze:
    """One maze: walls, start, both goals, and the unique shortest path to each goal.

    Attributes
    ----------
    walls : boolean array, shape (SIZE, SIZE), True where a wall stands.
    start, red, blue : cells as (row, column).
    red_path, blue_path : cells from the start to the goal, both ends included.
    """

    walls: NDArray[np.bool_]
    start: Cell
    red: Cell
    blue: Cell
    red_path: tuple[Cell, ...]
    blue_path: tuple[Cell, ...]

    @property
    def balanced(self) -> bool:
        """Whether both goals are equally far from the start."""
        return len(self.red_path) == len(self.blue_path)

    def path(self, goal: Goal) -> tuple[Cell, ...]:
        """Return the unique shortest path to ``goal``."""
        return self.red_path if goal == "red" else self.blue_path


@lru_cache(maxsize=1)
def _neighbours() -> tuple[tuple[int, ...], ...]:
    cells = []
    for i in range(SIZE * SIZE):
        r, c = divmod(i, SIZE)
        steps = ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
        cells.append(tuple(y * SIZE + x for y, x in steps if 0 <= y < SIZE and 0 <= x < SIZE))
    return tuple(cells)


def shortest_paths(floor: NDArray[np.bool_], start: Cell) -> tuple[list[int], list[int], list[int]]:
    """Breadth-first search over floor cells.

    Returns
    -------
    distance, ways, parent : lists over flat cells: moves from the start (-1 if unreachable), number of
        distinct shortest paths, and one predecessor on a shortest path.
    """
    free = floor.ravel().tolist()
    n = SIZE * SIZE
    distance, ways, parent = [-1] * n, [0] * n, [-1] * n
    origin = start[0] * SIZE + start[1]
    distance[origin], ways[origin] = 0, 1
    queue = [origin]
    neighbours = _neighbours()
    for cell in queue:
        for other in neighbours[cell]:
            if not free[other]:
                continue
            if distance[other] < 0:
                distance[other], parent[other] = distance[cell] + 1, cell
                queue.append(other)
            if distance[other] == distance[cell] + 1:
                ways[other] += ways[cell]
    return distance, ways, parent


def _walk_back(parent: list[int], cell: int) -> tuple[Cell, ...]:
    path = [cell]
    while parent[path[-1]] >= 0:
        path.append(parent[path[-1]])
    return tuple((c // SIZE, c % SIZE) for c in reversed(path))


def canonical_key(walls: NDArray[np.bool_], start: Cell, goals: tuple[Cell, Cell]) -> bytes:
    """Return the same bytes for all 16 images of a maze under rotation, reflection and exchange of goals."""
    grid = walls.astype(np.uint8)
    grid[start] = 2
    for goal in goals:
        grid[goal] = 3
    turned = [np.rot90(grid, k) for k in range(4)]
    return min(g.tobytes() for t in turned for g in (t, t[:, ::-1]))


def split_of(walls: NDArray[np.bool_], start: Cell, goals: tuple[Cell, Cell]) -> Split:
    """Assign a maze to a split by a hash of its canonical key, so that no held-out maze has a training image."""
    key = np.frombuffer(canonical_key(walls, start, goals), dtype=np.uint8).astype(np.uint64)
    code = 0
    for value in key.tolist():
        code = (code * 1_000_003 + value + 1) % (2**61 - 1)
    return "held_out" if (code >> 7) % HELD_OUT_SHARE == 0 else "train"


def generate(index: int, *, split: Split = "held_out", balanced: bool | None = None) -> Maze:
    """Generate maze number ``index`` of a split; the same arguments give the same maze anywhere.

    Parameters
    ----------
    index : position in the split's stream, at least 0.
    split : held-out mazes never occur in training, not even turned, mirrored or with exchanged goals.
    balanced : True or False to ask for goals equally or unequally far from the start; None for either.
    """
    tag = {None: 0, True: 1, False: 2}[balanced]
    rng = np.random.default_rng([0x3A2E, 0 if split == "train" else 1, tag, index])
    while True:
        walls = rng.random((SIZE, SIZE)) < WALL_SHARE
        cells = rng.permutation(np.flatnonzero(~walls.ravel()))
        maze = _try_goals(walls, cells, balanced)
        if maze is not None and split_of(walls, maze.start, (maze.red, maze.blue)) == split:
            return maze


def _try_goals(walls: NDArray[np.bool_], cells: NDArray[np.int64], balanced: bool | None) -> Maze | None:
    if len(cells) < MIN_PATH_CELLS + 1:
        return None
    start = divmod(int(cells[0]), SIZE)
    distance, ways, parent = shortest_paths(~walls, start)
    far = [int(c) for c in cells[1:] if distance[c] >= MIN_PATH_CELLS - 1 and ways[c] == 1]
    for i, red in enumerate(far):
        for blue in far[i + 1 :]:
            if balanced is not None and (distance[red] == distance[blue]) != balanced:
                continue
            red_path, blue_path = _walk_back(parent, red), _walk_back(parent, blue)
            # A path over the other goal would make "which goal was taken" depend on where one stops.
            if divmod(blue, SIZE) in red_path or divmod(red, SIZE) in blue_path:
                continue
            return Maze(
                walls=walls, start=start, red=red_path[-1], blue=blue_path[-1], red_path=red_path, blue_path=blue_path
            )
    return None


def first_frame(maze: Maze) -> NDArray[np.uint8]:
    """Return the given frame as classes, shape (SIZE, SIZE)."""
    grid = np.where(maze.walls, WALL, FLOOR).astype(np.uint8)
    grid[maze.red], grid[maze.blue], grid[maze.start] = RED, BLUE, AGENT
    return grid


def solution(maze: Maze, goal: Goal) -> NDArray[np.uint8]:
    """Return the video that walks to ``goal``, as classes, shape (FRAMES, SIZE, SIZE).

    Frame t shows the agent at position round(t (L - 1) / (FRAMES - 1)) of the path of L cells, the cells
    it has left behind as trail.
    """
    path = maze.path(goal)
    video = np.repeat(first_frame(maze)[None], FRAMES, axis=0)
    for t in range(FRAMES):
        reached = round(t * (len(path) - 1) / (FRAMES - 1))
        for cell in path[:reached]:
            video[t][cell] = TRAIL
        video[t][path[reached]] = AGENT
    return video


def draw(classes: NDArray[np.uint8], pixels_per_cell: int = PIXELS_PER_CELL) -> NDArray[np.uint8]:
    """Draw classes (..., SIZE, SIZE) as RGB (..., height, width, 3), 0 to 255."""
    rgb = PALETTE[classes]
    return rgb.repeat(pixels_per_cell, axis=-3).repeat(pixels_per_cell, axis=-2)
