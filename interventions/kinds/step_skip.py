"""Step skipping in its separate meanings: reuse, freeze, drop and repeat."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import model_validator

from interventions.base import Intervention, RowContext, Schedule, StepIndex, register
from interventions.sites import Geometry, LatentsAt, Point, PredictionAt, RunName


@register("step_skip")
class StepSkip(Intervention):
    """Take the computation of one denoising step away (or do it twice).

    ``mode`` "reuse": the denoiser is not asked; the solver gets the guided prediction of the step before.
    "freeze": the latents pass the step unchanged while the solver's clock advances. "drop": the step's sigma
    is removed from the schedule, so the step before jumps over it. "repeat": the step's update is taken twice,
    each with its own denoiser call at the same sigma. With a first-order solver, reuse and drop agree except at
    step 0, where there is no prediction to reuse.
    """

    formula: ClassVar[str] = (
        "reuse: v_s <- v_{s-1}; freeze: x_{s+1} <- x_s; drop: sigma_s removed from the schedule; "
        "repeat: x <- solver(x, v(x, sigma_s)) applied twice"
    )
    example: ClassVar[str] = "skip:\n  kind: step_skip\n  mode: [freeze, drop, repeat]\n  step: all"

    kind: Literal["step_skip"] = "step_skip"
    mode: Literal["reuse", "freeze", "drop", "repeat"]
    step: StepIndex
    run: RunName = "clean"

    @model_validator(mode="after")
    def _reuse_needs_a_predecessor(self) -> StepSkip:
        if self.mode == "reuse" and self.step == 0:
            raise ValueError("mode reuse has no earlier prediction at step 0; start at step 1")
        return self

    @property
    def schedule(self) -> Schedule | None:
        """Return the schedule change of drop and repeat."""
        return Schedule(self.mode, self.step) if self.mode in ("drop", "repeat") else None

    def first_computed_step(self, geometry: Geometry) -> int:
        """The step itself needs no denoiser call in any mode, except the second visit of repeat."""
        return self.step + 1

    def points(self, geometry: Geometry) -> tuple[Point, ...]:
        """Return the prediction of the step (reuse) or the latents after it (freeze)."""
        if self.mode == "reuse":
            return (PredictionAt(self.step),)
        return (LatentsAt(self.step + 1),) if self.mode == "freeze" else ()

    def apply(self, point: Point, value: torch.Tensor, context: RowContext) -> torch.Tensor:
        """Return the earlier prediction or the latents before the step."""
        kept = context.previous_prediction if self.mode == "reuse" else context.latents_before
        assert kept is not None
        return kept
