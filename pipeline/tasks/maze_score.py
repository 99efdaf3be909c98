"""Score decoded maze videos against symbolic truth: legality of frames, order, goal reached, steady walking.

A score that reads the last frame alone cannot tell a solution from a hard cut to its end, and a score that pays
for resemblance pays for doing nothing. Here a video has to be a walk: see ``Score`` for the rules and
``trajectory`` for the floor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.samples import Sample
from pipeline.tasks import maze_world as world

BALANCE: dict[str, bool | None] = {"yes": True, "no": False, "either": None}
"""The parameter ``balanced`` of a sample as the argument of ``maze_world.generate``."""
UNCLEAR = 255
"""Class of a pixel that shows none: a frame with one is not legal."""
GOALS: tuple[world.Goal, ...] = ("red", "blue")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a video shows, frame by frame; frame 0 is given, so the true first frame stands in its place.

    Attributes
    ----------
    legal : per frame, whether it shows exactly the walls of the maze, one agent, a trail that is a simple path
        from the start to the agent over floor cells, and every goal the agent does not stand on, with no unclear pixel.
    ordered : per transition, whether every cell marked (trail or agent) before is still marked after.
    reached : goal under the agent of the last frame, legal or not.
    trajectory : share of frames 1 and later that keep up a steady walk to a goal; see ``trajectory``.
    walls_intact : whether the walls of every frame are exactly the walls of the maze.
    """

    legal: tuple[bool, ...]
    ordered: tuple[bool, ...]
    reached: world.Goal | None
    trajectory: float
    walls_intact: bool

    @property
    def answer(self) -> world.Goal | None:
        """Return the goal that the last frame solves the maze for, if any."""
        return self.reached if self.legal[-1] else None

    def solved(self, goal: world.Goal | None = None) -> bool:
        """Whether the last frame is legal with the agent on ``goal``, or on any goal."""
        return self.answer is not None and goal in (None, self.answer)


def classify(video: NDArray[np.floating] | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the class of every pixel, (..., 3) in 0 to 255 to (...), ``UNCLEAR`` where it shows no class.

    A pixel shows a class if it is at least twice as near to its colour as to any other. The nearest colour alone
    would be a majority vote: a clean estimate that is still a blend of two answers, 55 to 45, would decode to a
    legal solution of the first, because every cell leans the same way.
    """
    distances = _squared_distances(video)
    first, second = np.partition(distances, 1, axis=0)[:2]
    classes: NDArray[np.uint8] = np.where(4 * first <= second, distances.argmin(0), UNCLEAR).astype(np.uint8)
    return classes


def lean(video: NDArray[np.floating] | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the class of the nearest colour of every pixel, clear or not: which answer a blend leans to."""
    nearest: NDArray[np.uint8] = _squared_distances(video).argmin(0).astype(np.uint8)
    return nearest


def _squared_distances(video: NDArray[np.floating] | NDArray[np.uint8]) -> NDArray[np.float32]:
    pixels = np.asarray(video, dtype=np.float32)
    return np.stack([((pixels - colour) ** 2).sum(-1) for colour in world.PALETTE.astype(np.float32)])


def score(maze: world.Maze, classes: NDArray[np.uint8]) -> Score:
    """Score one video of classes, shape (FRAMES, SIZE, SIZE).

    Raises
    ------
    ValueError : the video has another shape.
    """
    expected = (world.FRAMES, world.SIZE, world.SIZE)
    if classes.shape != expected:
        raise ValueError(
            f"a maze video has shape {expected}, got {classes.shape}. "
            "Decode it to one pixel a cell and classify one row at a time."
        )
    video = np.concatenate([world.first_frame(maze)[None], classes[1:]])
    marks = marked(video)
    legal = tuple(_is_legal(maze, frame) for frame in video)
    ordered = tuple(not bool((before & ~after).any()) for before, after in pairwise(marks))
    return Score(
        legal=legal,
        ordered=ordered,
        reached=_reached(maze, video[-1]),
        trajectory=max(trajectory(maze, marks, legal, ordered, goal) for goal in GOALS),
        walls_intact=bool(((video == world.WALL) == maze.walls).all()),
    )


def trajectory(
    maze: world.Maze, marks: NDArray[np.bool_], legal: tuple[bool, ...], ordered: tuple[bool, ...], goal: world.Goal
) -> float:
    """Return the share of frames 1 and later that keep up a steady walk to ``goal``.

    Frame t counts if it is legal, if nothing marked in the frame before is gone, and if the trail is the
    beginning of the shortest path, as long as a steady walk of n moves in F - 1 transitions allows: from
    max(1, floor(t n / (F - 1))) to ceil(t n / (F - 1)) moves.

    The pace is what makes the floor honest: legality and order alone give a video that never moves, or one that
    jumps to the end, full marks. "Has grown since the frame before" is no substitute, because a true walk of
    three moves over five transitions rests twice. So: true solution 1, static first frame 0, hard cut to the last
    frame at most 0.4 (only the frames in which the walk is due to end).
    """
    path, last = maze.path(goal), world.FRAMES - 1
    moves = len(path) - 1
    counted = 0
    for t in range(1, world.FRAMES):
        done = int(marks[t].sum()) - 1
        due = max(1, t * moves // last), -(-t * moves // last)
        if legal[t] and ordered[t - 1] and due[0] <= done <= due[1]:
            counted += all(marks[t][cell] for cell in path[: done + 1])
    return counted / last


def answer(maze: world.Maze, frame: NDArray[np.uint8]) -> world.Goal | None:
    """Return the goal that a last frame of classes solves the maze for, if any; ``Score.answer`` of one frame."""
    return _reached(maze, frame) if _is_legal(maze, frame) else None


def marked(classes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return where the agent is or has been."""
    marks: NDArray[np.bool_] = (classes == world.TRAIL) | (classes == world.AGENT)
    return marks


def _reached(maze: world.Maze, frame: NDArray[np.uint8]) -> world.Goal | None:
    agents = np.argwhere(frame == world.AGENT)
    if len(agents) != 1:
        return None
    cell = (int(agents[0][0]), int(agents[0][1]))
    return "red" if cell == maze.red else "blue" if cell == maze.blue else None


def _is_legal(maze: world.Maze, frame: NDArray[np.uint8]) -> bool:
    agents = np.argwhere(frame == world.AGENT)
    if bool((frame == UNCLEAR).any()):
        return False
    if len(agents) != 1 or bool(((frame == world.WALL) != maze.walls).any()):
        return False
    goals = np.full_like(frame, world.FLOOR)
    goals[maze.red], goals[maze.blue] = world.RED, world.BLUE
    standing = np.where(frame == world.AGENT, world.FLOOR, goals)
    shown = np.where((frame == world.RED) | (frame == world.BLUE), frame, world.FLOOR)
    if bool((shown != standing).any()):
        return False
    marks = marked(frame)
    if not marks[maze.start]:
        return False
    distance, _, _ = world.shortest_paths(marks, maze.start)
    # As many marked cells as the shortest way through them needs: no branch, loop, gap or stray mark.
    return distance[int(agents[0][0]) * world.SIZE + int(agents[0][1])] == int(marks.sum()) - 1


@lru_cache(maxsize=4096)
def held_out_maze(index: int, balanced: str = "either") -> world.Maze:
    """Return a held-out maze by its number; ``balanced`` is "yes", "no" or "either".

    Raises
    ------
    ValueError : another word for ``balanced``.
    """
    if balanced not in BALANCE:
        raise ValueError(f"unknown value of balanced: {balanced!r}. Use one of {', '.join(BALANCE)}.")
    return world.generate(index, split="held_out", balanced=BALANCE[balanced])


def maze_of(sample: Sample) -> world.Maze:
    """Return the held-out maze that a sample's parameters ``maze`` and ``balanced`` name."""
    return held_out_maze(int(sample.parameters["maze"]), str(sample.parameters.get("balanced", "either")))
