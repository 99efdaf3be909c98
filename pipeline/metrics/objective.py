"""Objectives: metrics of latents as differentiable functions, for estimates of effects from one backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A differentiable objective of latents.

    Attributes
    ----------
    name : of the metric that it equals. description : its definition in one sentence.
    compute : from latents (rows, C, F, H, W) and the final latents of the recorded clean and corrupted run
        (C, F, H, W), one value a row.
    """

    name: str
    description: str
    compute: Compute


OBJECTIVES: dict[str, Objective] = {}


def register_objective(objective: Objective) -> Objective:
    """Register an objective under the name of its metric.

    Raises
    ------
    ValueError : the name is taken.
    """
    if objective.name in OBJECTIVES:
        raise ValueError(f"objective {objective.name!r} is registered twice. Give one of the two another name.")
    OBJECTIVES[objective.name] = objective
    return objective


def _clean_projection(latents: torch.Tensor, clean: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
    direction = clean - corrupted
    return ((latents - corrupted) * direction).flatten(1).sum(dim=1) / direction.square().sum()


def _latent_distance(latents: torch.Tensor, clean: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
    squared = (latents - clean).square().flatten(1).mean(dim=1)
    # The root has no slope at 0, where a run is the clean one itself; without this its gradient is NaN.
    return torch.where(squared > 0, squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt(), squared)


clean_projection = register_objective(
    Objective(
        name="clean_projection",
        description="<x - b, a - b> / |a - b|^2 with the final latents a of the clean, b of the corrupted run.",
        compute=_clean_projection,
    )
)

latent_distance = register_objective(
    Objective(
        name="latent_distance",
        description="root mean square difference from the final latents of the clean run.",
        compute=_latent_distance,
    )
)
