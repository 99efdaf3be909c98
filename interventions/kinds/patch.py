"""Activation patching: activations of the donor run written into the recipient run at one site."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from interventions.base import (
    FrameIndex,
    Intervention,
    LayerIndex,
    RowContext,
    StepIndex,
    register,
    sites_at,
)
from interventions.sites import Branch, Component, Geometry, Point, RunName, Site


@register("patch")
class Patch(Intervention):
    """Replace, or interpolate towards, the donor's activation of one component of one block at one step.

    ``direction`` "denoising" writes the clean run into the corrupted one (is the site sufficient?), "noising"
    the corrupted into the clean (is it necessary?), "self" a run into itself (the negative control).
    ``frame`` limits the patch to the tokens of one latent frame.
    """

    formula: ClassVar[str] = "h <- (1 - alpha) h_recipient + alpha h_donor, on the chosen component and tokens"
    example: ClassVar[str] = (
        "patch_map:\n  kind: patch\n  direction: denoising\n  step: all\n  layer: all\n  component: [attn1, attn2, ffn]"
    )
    contrast: ClassVar[bool] = True

    kind: Literal["patch"] = "patch"
    direction: Literal["denoising", "noising", "self"] = "denoising"
    step: StepIndex
    layer: LayerIndex
    component: Component = "update"
    frame: FrameIndex | None = None
    branch: Branch | Literal["both"] = "both"
    alpha: Annotated[float, Field(ge=-1, le=2)] = 1.0

    @property
    def recipient(self) -> RunName:
        """Corrupted when denoising, else clean."""
        return "corrupted" if self.direction == "denoising" else "clean"

    @property
    def donor(self) -> RunName:
        """Corrupted when noising, else clean."""
        return "corrupted" if self.direction == "noising" else "clean"

    def points(self, geometry: Geometry) -> tuple[Site, ...]:
        """Return the site in each asked branch."""
        return sites_at(self.step, self.layer, self.component, geometry, self.branch)

    def donor_sites(self, geometry: Geometry) -> tuple[Site, ...]:
        """Return the same sites as ``points``."""
        return self.points(geometry)

    def apply(self, point: Point, value: torch.Tensor, context: RowContext) -> torch.Tensor:
        """Interpolate to the donor; exact at alpha 0 and 1 because ``lerp`` is."""
        assert isinstance(point, Site)
        donor = context.donors[point].to(value.dtype)
        if self.frame is None:
            return torch.lerp(value, donor, self.alpha)
        out = value.clone()
        n = context.geometry.tokens_per_frame
        tokens = slice(self.frame * n, (self.frame + 1) * n)
        out[tokens] = torch.lerp(value[tokens], donor[tokens], self.alpha)
        return out
