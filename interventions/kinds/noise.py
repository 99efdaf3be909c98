"""Noise at a step (all frames, once) or at a frame (one frame, every step), off the path and on it."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import model_validator

from interventions.base import FrameIndex, Intervention, RowContext, StepIndex, register
from interventions.sites import Geometry, LatentsAt, Point, RunName


@register("noise")
class Noise(Intervention):
    """Replace latents by noise, everything at one step or one frame at all steps.

    ``path`` "off_path" replaces the latents by unit noise, which at low sigma lies far off the distribution that the
    model was trained on (the published "Noise at Step" and "Noise at Frame"). "on_path" re-noises the model's own
    clean estimate to the step's sigma, so the latents stay on the path and only the information that noise
    destroys is lost. For a window of steps, a set of frames or a box there is ``latent_noise``.
    """

    formula: ClassVar[str] = (
        "off_path: x_s <- eps; on_path: x_s <- alpha_s x0_hat + sigma_s eps, x0_hat from step s (at step) "
        "or from the step before (at frame)"
    )
    example: ClassVar[str] = "noise_step:\n  kind: noise\n  at: step\n  path: [off_path, on_path]\n  step: all"

    kind: Literal["noise"] = "noise"
    at: Literal["step", "frame"]
    path: Literal["off_path", "on_path"] = "on_path"
    step: StepIndex | None = None
    frame: FrameIndex | None = None
    run: RunName = "clean"

    @model_validator(mode="after")
    def _fields_fit(self) -> Noise:
        if (self.at == "step") != (self.step is not None) or (self.at == "frame") != (self.frame is not None):
            raise ValueError("give step with `at: step`, frame with `at: frame`, and not the other")
        return self

    @property
    def restores(self) -> bool:
        """On the path at a step, the estimate is that of the recorded run."""
        return self.at == "step" and self.path == "on_path"

    def points(self, geometry: Geometry) -> tuple[Point, ...]:
        """Return the latents entering the step, or entering every step."""
        if self.step is not None:
            return (LatentsAt(self.step),)
        return tuple(LatentsAt(s) for s in range(geometry.steps))

    def apply(self, point: Point, value: torch.Tensor, context: RowContext) -> torch.Tensor:
        """Return re-noised latents; the draw depends on sample, step and frame only."""
        step = point.step
        eps = context.noise_like(value, f"noise at {self.at}", step)
        if self.frame is None:
            return self._mix(context.recorded_x0_hat[step], eps, context.levels[step])
        estimate = context.x0_hat
        # Before the first prediction there is no estimate, and on the path only the noise of the level is left.
        estimate = torch.zeros_like(eps) if estimate is None else estimate
        renoised = self._mix(estimate, eps, context.levels[step])
        together = context.geometry.frame_patch
        shown = slice(self.frame * together, (self.frame + 1) * together)
        out = value.clone()
        out[:, shown] = renoised[:, shown]
        return out

    def _mix(self, estimate: torch.Tensor, eps: torch.Tensor, level: tuple[float, float]) -> torch.Tensor:
        alpha, sigma = level
        return eps if self.path == "off_path" else alpha * estimate + sigma * eps
