"""Steering: the difference between the means of clean and corrupted runs added to an activation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from interventions.base import RowContext, RunRef, Source, register
from interventions.hidden import HiddenIntervention
from interventions.sites import RUNS, RunName, Site


@register("steer")
class Steer(HiddenIntervention):
    """Add the difference of means between clean and corrupted runs to a component of a block at a step.

    The direction is the mean activation of the clean runs of the sweep's first ``reference`` problems minus that of
    their corrupted runs, taken at the very site that is changed. It keeps its length: strength 1 moves the
    activation by the mean contrast, towards the clean runs, -1 as far the other way. ``per_token`` false: one
    vector of channels for all tokens, averaged over every token of the reference runs (given frames too); true: a
    vector for each token. Where the runs of a pair agree, as before their prompts are first read, it is zero
    up to rounding, and never scaled up to more.
    """

    formula: ClassVar[str] = "h <- h + strength (mean h_clean - mean h_corrupted), over the reference samples"
    example: ClassVar[str] = (
        "steering:\n  kind: steer\n  run: corrupted\n  strength: [0.5, 1.0, 2.0]\n  step: all\n  layer: all\n"
        "  component: residual"
    )

    kind: Literal["steer"] = "steer"
    strength: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    per_token: bool = False
    reference: Annotated[int, Field(ge=1, le=1024)] = 8
    run: RunName = "corrupted"

    def sources(self) -> tuple[Source, ...]:
        """Return the clean and the corrupted runs of the reference samples."""
        return tuple(tuple(RunRef(run=run, sample=i, fixed=True) for i in range(self.reference)) for run in RUNS)

    def change(
        self, point: Site, value: torch.Tensor, donors: tuple[torch.Tensor, ...], context: RowContext
    ) -> torch.Tensor:
        """Move the activation along the direction."""
        direction = donors[0] - donors[1]
        return value + self.strength * (direction if self.per_token else direction.mean(dim=0))
