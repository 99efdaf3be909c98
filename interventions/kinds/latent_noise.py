"""Noise on some latents, at a step or a window of steps: added to them, or in their place at the step's level."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from interventions.base import RowContext, register, window
from interventions.hidden import LatentIntervention
from interventions.sites import Geometry, LatentsAt, Point, RunName


@register("latent_noise")
class LatentNoise(LatentIntervention):
    """Noise some frames or a box of the latents at a step or at each step of a window.

    ``form`` "on_path" re-noises the row's own latest clean estimate, that of the step before, to the step's level:
    the latents stay on the path that the model was trained on. At step 0 there is no estimate, and new noise of the
    step's level takes its place. The estimate is the row's own, not the recorded run's, so that a later step of the
    window does not bring back what an earlier one destroyed. "additive" adds noise of standard deviation
    ``strength``, in units of the latents, which then hold more noise than the step's level says. Every step has a
    draw of its own, shared by both forms; a region gets its part of the draw for all latents. Given frames are set
    anew by the pipeline, so noise on them is lost.
    """

    formula: ClassVar[str] = (
        "on_path: x_s <- alpha_s x0_hat + sigma_s eps, x0_hat of step s - 1; additive: x_s <- x_s + strength eps"
    )
    example: ClassVar[str] = (
        'latent_noise:\n  kind: latent_noise\n  form: [on_path, additive]\n  step: all\n  steps: 2\n  frames: "2-4"'
    )

    kind: Literal["latent_noise"] = "latent_noise"
    form: Literal["on_path", "additive"] = "on_path"
    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    run: RunName = "clean"

    @model_validator(mode="after")
    def _strength_fits(self) -> LatentNoise:
        if self.form == "on_path" and self.strength != 1.0:
            raise ValueError("strength has no meaning with `form: on_path`: the step's level says how much noise")
        return self

    def points(self, geometry: Geometry) -> tuple[Point, ...]:
        """Return the latents entering each step of the window."""
        return tuple(LatentsAt(s) for s in window(self.step, self.steps, geometry.steps, "step"))

    def apply(self, point: Point, value: torch.Tensor, context: RowContext) -> torch.Tensor:
        """Return the latents with noise where it is meant."""
        eps = context.noise_like(value, "latent_noise", point.step)
        return self.restrict(self._noised(value, eps, point.step, context), value, context.geometry)

    def _noised(self, value: torch.Tensor, eps: torch.Tensor, step: int, context: RowContext) -> torch.Tensor:
        if self.form == "additive":
            return value + self.strength * eps
        alpha, sigma = context.levels[step]
        return sigma * eps if context.x0_hat is None else alpha * context.x0_hat + sigma * eps
