"""Frame shuffling: latent frames exchanged, reversed, frozen or dropped, in the latents or in hidden tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import model_validator

from interventions.base import FrameIndex, Intervention, LayerIndex, RowContext, StepIndex, Window, register, window
from interventions.hidden import by_frame
from interventions.sites import Branch, Component, Geometry, LatentsAt, NoSuchSiteError, Point, RunName, Site

ONLY_HIDDEN = ("layers", "component", "branch")
"""Fields that say where hidden tokens are shuffled."""


@register("frame_shuffle")
class FrameShuffle(Intervention):
    """Reorder the generated latent frames where they enter a step or where they leave a component of a block.

    ``mode`` "permute": a random order without fixed points, drawn from the sample's seed. "reverse": last frame
    first. "freeze": every frame after ``frame`` shows ``frame``. "drop": ``frame`` shows the frame before it, or
    the one after it if it is the first that is generated. Given (conditioning) frames never move.
    ``space`` "latents" acts on the latents entering ``step``; "hidden" on the tokens that ``component`` of block
    ``layer`` gives, in ``branch``.

    ``steps`` and ``layers`` repeat it at every point of a window, always in the same order: the permutation is drawn
    from ``step`` and ``layer``. Where one point feeds the next, as latents and residuals do, frames that moved move
    again, so a second reversal undoes the first; freeze and drop change nothing more. Where a token frame holds
    several frames of the latents, they move together.
    """

    formula: ClassVar[str] = (
        "z[f] <- z[p(f)], p a derangement (permute), reversal (reverse), min(f, frame) (freeze), or f except "
        "p(frame) = frame - 1 (drop)"
    )
    example: ClassVar[str] = (
        "shuffle:\n  kind: frame_shuffle\n  space: latents\n  mode: [permute, reverse]\n  step: all"
    )

    kind: Literal["frame_shuffle"] = "frame_shuffle"
    space: Literal["latents", "hidden"] = "latents"
    mode: Literal["permute", "reverse", "freeze", "drop"]
    step: StepIndex
    steps: Window = 1
    layer: LayerIndex | None = None
    layers: Window = 1
    component: Component = "residual"
    branch: Branch | Literal["both"] = "both"
    frame: FrameIndex | None = None
    run: RunName = "clean"

    @model_validator(mode="after")
    def _fields_fit(self) -> FrameShuffle:
        if (self.space == "hidden") != (self.layer is not None):
            raise ValueError("layer is needed with `space: hidden` and has no meaning with `space: latents`")
        if (self.mode in ("freeze", "drop")) != (self.frame is not None):
            raise ValueError("frame is needed with `mode: freeze` or `drop` and has no meaning with the other modes")
        for name in ONLY_HIDDEN if self.space == "latents" else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no meaning with `space: latents`; it belongs to `space: hidden`")
        return self

    def points(self, geometry: Geometry) -> tuple[Point, ...]:
        """Return the latents entering each step, or the component of each block in every asked branch."""
        if self.layer is None:
            return tuple(LatentsAt(s) for s in window(self.step, self.steps, geometry.steps, "step"))
        return tuple(
            Site(step, branch, block, self.component)
            for step in window(self.step, self.steps, geometry.steps, "step")
            for branch in (geometry.branches if self.branch == "both" else (self.branch,))
            for block in window(self.layer, self.layers, geometry.blocks, "layer")
        )

    def check(self, geometry: Geometry) -> None:
        """Check the frame as well, and that a dropped one has a neighbour."""
        super().check(geometry)
        generated = geometry.generated_frames
        if self.frame is not None and self.frame not in generated:
            raise NoSuchSiteError(f"frame {self.frame}: this run generates frames {generated[0]} to {generated[-1]}")
        if self.mode == "drop" and len(generated) == 1:
            raise NoSuchSiteError(f"frame {self.frame} is the only one generated: no neighbour can take its place")

    def source_frames(self, context: RowContext) -> list[int]:
        """Return, for each frame, the frame whose content it receives."""
        geometry = context.geometry
        moved = list(geometry.generated_frames)
        if self.mode == "reverse":
            sources = moved[::-1]
        elif self.mode == "permute":
            sources = self._derangement(moved, context)
        else:
            assert self.frame is not None
            shown = self.frame - 1 if self.frame > moved[0] else self.frame + 1
            freeze = self.mode == "freeze"
            sources = [min(f, self.frame) if freeze else shown if f == self.frame else f for f in moved]
        return [*range(geometry.given_frames), *sources]

    def _derangement(self, frames: list[int], context: RowContext) -> list[int]:
        # Sattolo's algorithm: one cycle through all frames, so no frame keeps its place.
        generator = context.generator("frame_shuffle", self.step, -1 if self.layer is None else self.layer)
        sources = frames.copy()
        for i in range(len(sources) - 1, 0, -1):
            j = int(generator.integers(i))
            sources[i], sources[j] = sources[j], sources[i]
        return sources

    def apply(self, point: Point, value: torch.Tensor, context: RowContext) -> torch.Tensor:
        """Gather frames by ``source_frames``."""
        order = torch.tensor(self.source_frames(context), device=value.device)
        if isinstance(point, Site):
            return by_frame(value, context.geometry)[order].flatten(0, 1)
        together = context.geometry.frame_patch
        latent_frames = order[:, None] * together + torch.arange(together, device=value.device)
        return value[:, latent_frames.flatten()]
