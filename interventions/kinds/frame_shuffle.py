"""Frame shuffling: latent frames exchanged, reversed or frozen, in the latents or in hidden tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import model_validator

from interventions.base import FrameIndex, Intervention, LayerIndex, RowContext, StepIndex, over_frames, register
from interventions.sites import Geometry, LatentsAt, Point, RunName, Site


@register("frame_shuffle")
class FrameShuffle(Intervention):
    """Reorder the generated latent frames once, where they enter a step or where they leave a block.

    ``mode`` "permute": a random order without fixed points, drawn from the sample's seed. "reverse": last frame
    first. "freeze": every frame after ``frame`` shows ``frame``. Given (conditioning) frames never move.
    ``space`` "latents" acts on the latents entering ``step``; "hidden" on the tokens that leave block ``layer``.
    """

    formula: ClassVar[str] = "z[f] <- z[p(f)], p a derangement (permute), reversal (reverse), or min(f, frame) (freeze)"
    example: ClassVar[str] = (
        "shuffle:\n  kind: frame_shuffle\n  space: latents\n  mode: [permute, reverse]\n  step: all"
    )

    kind: Literal["frame_shuffle"] = "frame_shuffle"
    space: Literal["latents", "hidden"] = "latents"
    mode: Literal["permute", "reverse", "freeze"]
    step: StepIndex
    layer: LayerIndex | None = None
    frame: FrameIndex | None = None
    run: RunName = "clean"

    @model_validator(mode="after")
    def _fields_fit(self) -> FrameShuffle:
        if (self.space == "hidden") != (self.layer is not None):
            raise ValueError("layer is needed with `space: hidden` and has no meaning with `space: latents`")
        if (self.mode == "freeze") != (self.frame is not None):
            raise ValueError("frame is needed with `mode: freeze` and has no meaning with the other modes")
        return self

    def points(self, geometry: Geometry) -> tuple[Point, ...]:
        """Return the latents entering the step, or the block's residual in every branch."""
        if self.layer is None:
            return (LatentsAt(self.step),)
        return tuple(Site(self.step, b, self.layer, "residual") for b in geometry.branches)

    def source_frames(self, context: RowContext) -> list[int]:
        """Return, for each frame, the frame whose content it receives."""
        geometry = context.geometry
        moved = list(geometry.generated_frames)
        if self.mode == "reverse":
            sources = moved[::-1]
        elif self.mode == "freeze":
            assert self.frame is not None
            sources = [min(f, self.frame) for f in moved]
        else:
            # Sattolo's algorithm: one cycle through all frames, so no frame keeps its place.
            generator = context.generator("frame_shuffle", self.step, -1 if self.layer is None else self.layer)
            sources = moved.copy()
            for i in range(len(sources) - 1, 0, -1):
                j = int(generator.integers(i))
                sources[i], sources[j] = sources[j], sources[i]
        return [*range(geometry.given_frames), *sources]

    def apply(self, point: Point, value: torch.Tensor, context: RowContext) -> torch.Tensor:
        """Gather frames by ``source_frames``."""
        order = torch.tensor(self.source_frames(context), device=value.device)
        if isinstance(point, Site):
            return over_frames(value, context.geometry, lambda v: v[order])
        return value[:, order]
