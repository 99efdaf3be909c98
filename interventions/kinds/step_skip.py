"""Step skipping in its separate meanings: reuse, reuse of one branch, freeze, drop, repeat and swap."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import model_validator

from interventions.base import Intervention, RowContext, Schedule, StepIndex, register
from interventions.sites import Branch, Geometry, LatentsAt, NoSuchSiteError, OutputAt, Point, PredictionAt, RunName


@register("step_skip")
class StepSkip(Intervention):
    """Take the computation of one denoising step away, do it twice, or do it in another place.

    ``mode`` "reuse": the denoiser is not asked; the solver gets the guided prediction of the step before.
    "reuse_branch": only the output of one guidance ``branch`` is that of the step before. "freeze": the latents pass
    the step unchanged while the solver's clock advances. "drop": the step's sigma is removed from the schedule, so
    the step before jumps over it. "repeat": the step's update is taken twice, each with its own denoiser call at the
    same sigma. "swap": the step and ``other`` (the next one unless given) exchange places, each with its own sigma,
    timestep and increment. With a first-order solver, reuse and drop agree except at step 0, where there is no
    prediction to reuse.
    """

    formula: ClassVar[str] = (
        "reuse: v_s <- v_{s-1}; reuse_branch: the same for one guidance branch; freeze: x_{s+1} <- x_s; "
        "drop: sigma_s removed from the schedule; repeat: x <- solver(x, v(x, sigma_s)) applied twice; "
        "swap: steps s and s' taken in each other's place"
    )
    example: ClassVar[str] = "skip:\n  kind: step_skip\n  mode: [freeze, drop, repeat]\n  step: all"

    kind: Literal["step_skip"] = "step_skip"
    mode: Literal["reuse", "reuse_branch", "freeze", "drop", "repeat", "swap"]
    step: StepIndex
    other: StepIndex | None = None
    branch: Branch | None = None
    run: RunName = "clean"

    @model_validator(mode="after")
    def _fields_fit(self) -> StepSkip:
        if self.mode in ("reuse", "reuse_branch") and self.step == 0:
            raise ValueError(f"mode {self.mode} has no earlier prediction at step 0; start at step 1")
        if (self.mode == "reuse_branch") != (self.branch is not None):
            raise ValueError("branch is needed with `mode: reuse_branch` and has no meaning with the other modes")
        if self.mode != "swap" and self.other is not None:
            raise ValueError("other names the second step of `mode: swap` and has no meaning with the other modes")
        if self.other == self.step:
            raise ValueError(f"mode swap exchanges two steps; other is step {self.step} itself")
        return self

    @property
    def schedule(self) -> Schedule | None:
        """Return the schedule change of drop, repeat and swap."""
        if self.mode == "drop" or self.mode == "repeat":
            return Schedule(self.mode, self.step)
        if self.mode == "swap":
            # The earlier step first: both ways to name one exchange are one schedule, and rows of it can share a fork.
            first, second = sorted((self.step, self._partner))
            return Schedule("swap", first, second)
        return None

    @property
    def _partner(self) -> int:
        return self.step + 1 if self.other is None else self.other

    def first_computed_step(self, geometry: Geometry) -> int:
        """The step itself needs no denoiser call in any mode, except the second visit of repeat and either of swap."""
        return min(self.step, self._partner) if self.mode == "swap" else self.step + 1

    def points(self, geometry: Geometry) -> tuple[Point, ...]:
        """Return the prediction of the step (reuse), one branch of it, or the latents after it (freeze)."""
        if self.mode == "reuse":
            return (PredictionAt(self.step),)
        if self.branch is not None:
            return (OutputAt(self.step, self.branch),)
        return (LatentsAt(self.step + 1),) if self.mode == "freeze" else ()

    def check(self, geometry: Geometry) -> None:
        """Check that the steps of a schedule edit exist as well."""
        super().check(geometry)
        if self.mode == "drop" and geometry.steps == 1:
            raise NoSuchSiteError("mode drop would leave no step: this sampler has 1")
        last = max(self.step, self._partner) if self.mode == "swap" else self.step
        if last >= geometry.steps:
            raise NoSuchSiteError(f"mode {self.mode}: there is no step {last}, the last one is {geometry.steps - 1}")

    def apply(self, point: Point, value: torch.Tensor, context: RowContext) -> torch.Tensor:
        """Return the earlier prediction, the branch's earlier output, or the latents before the step."""
        if isinstance(point, OutputAt):
            return context.previous_outputs[point.branch]
        kept = context.previous_prediction if self.mode == "reuse" else context.latents_before
        assert kept is not None
        return kept
