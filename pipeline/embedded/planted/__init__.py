"""Tiny Wan models whose mechanism is known by construction: the ground truth that interventions must find."""

from pipeline.embedded.planted.base import PLANTED, Hop, Planted
from pipeline.embedded.planted.frame_paths import FRAME_PATH, HEAD_PATH
from pipeline.embedded.planted.prompt_paths import BRANCH_ONLY, EXPERT_ONLY, PROMPT_BLOCK, SIGMA_WINDOW

__all__ = [
    "BRANCH_ONLY",
    "EXPERT_ONLY",
    "FRAME_PATH",
    "HEAD_PATH",
    "PLANTED",
    "PROMPT_BLOCK",
    "SIGMA_WINDOW",
    "Hop",
    "Planted",
]
