"""Metrics of the maze task, all against symbolic truth: which goal the video goes to, and whether it is a walk."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics.metric import Metric, MetricInput, projection, register_metric
from pipeline.samples import Sample
from pipeline.tasks import maze_score
from pipeline.tasks import maze_world as world

TASKS = ("maze",)


def goals(sample: Sample) -> tuple[world.Goal, world.Goal]:
    """Return the goal that the clean prompt names, and the other one.

    Raises
    ------
    ValueError : the clean prompt leaves the goal open, so there is nothing to measure towards.
    """
    if sample.clean_prompt == "red":
        return "red", "blue"
    if sample.clean_prompt == "blue":
        return "blue", "red"
    raise ValueError(
        f"the clean prompt of sample {sample.index} names no goal: {sample.clean_prompt!r}. "
        "Use a pair with a clean prompt of red or blue, for example red/any."
    )


def _targets(sample: Sample) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the videos to the clean and to the other goal, one pixel a cell, without the given frame."""
    maze = maze_score.maze_of(sample)
    clean, other = (world.PALETTE[world.solution(maze, goal)[1:]].astype(np.float32) for goal in goals(sample))
    return clean, other


def _goal_evidence(given: MetricInput) -> NDArray[np.float64]:
    clean, other = _targets(given.sample)
    return projection(given.video[:, 1:], other, clean)


def _goal_evidence_floor(sample: Sample) -> float:
    clean, other = _targets(sample)
    still = world.PALETTE[world.first_frame(maze_score.maze_of(sample))].astype(np.float32)
    return float(projection(np.broadcast_to(still, (1, *clean.shape)), other, clean)[0])


def _scored(read: Callable[[maze_score.Score, Sample], float]) -> Callable[[MetricInput], NDArray[np.float64]]:
    def compute(given: MetricInput) -> NDArray[np.float64]:
        maze = maze_score.maze_of(given.sample)
        scores = (maze_score.score(maze, classes) for classes in maze_score.classify(given.video))
        return np.array([read(score, given.sample) for score in scores], dtype=np.float64)

    return compute


def _zero(sample: Sample) -> float:
    return 0.0


goal_evidence = register_metric(
    Metric(
        name="goal_evidence",
        long_name="evidence for the clean goal",
        description="Projection of the generated frames (1 and later) onto the segment between the true video to the "
        "other goal (0) and the true video to the clean prompt's goal (1): <x - b, a - b> / |a - b|^2.",
        tasks=TASKS,
        compute=_goal_evidence,
        floor=_goal_evidence_floor,
    )
)

solved = register_metric(
    Metric(
        name="solved",
        long_name="solved for the clean goal",
        description="1 if the last frame is legal (every pixel at least twice as near to its colour as to any other, "
        "walls, one agent, trail a simple path from the start) with the agent on the clean prompt's goal, else 0.",
        tasks=TASKS,
        compute=_scored(lambda score, sample: float(score.solved(goals(sample)[0]))),
        floor=_zero,
    )
)

solved_any = register_metric(
    Metric(
        name="solved_any",
        long_name="solved for either goal",
        description="1 if the last frame is legal with the agent on either goal, else 0.",
        tasks=TASKS,
        compute=_scored(lambda score, sample: float(score.solved())),
        floor=_zero,
    )
)

trajectory = register_metric(
    Metric(
        name="trajectory",
        long_name="steady walk to either goal",
        description="Share of frames 1 and later that are legal, keep every cell marked in the frame before, and show "
        "the beginning of the shortest path to a goal as far as a steady walk would be; the larger of both goals.",
        tasks=TASKS,
        compute=_scored(lambda score, sample: score.trajectory),
        floor=_zero,
    )
)

reached_clean = register_metric(
    Metric(
        name="reached_clean",
        long_name="agent on the clean goal",
        description="1 if the only agent of the last frame stands on the clean prompt's goal, by a legal path or not, "
        "else 0.",
        tasks=TASKS,
        compute=_scored(lambda score, sample: float(score.reached == goals(sample)[0])),
        floor=_zero,
    )
)
