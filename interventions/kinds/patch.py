"""Activation patching: activations of a donor run written into the recipient run."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from interventions.base import RowContext, RunRef, Source, register
from interventions.hidden import HiddenIntervention
from interventions.sites import RunName, Site


@register("patch")
class Patch(HiddenIntervention):
    """Replace, or interpolate towards, the donor's activation of a component of a block at a step.

    ``direction`` "denoising" writes the clean run into the corrupted one (is the site sufficient?), "noising"
    the corrupted into the clean (is it necessary?), "self" a run into itself (the negative control). ``donor_sample``
    takes the donor from another problem, that many further along the sweep: the wrong-pair control.
    """

    formula: ClassVar[str] = "h <- (1 - alpha) h_recipient + alpha h_donor, on the chosen component and tokens"
    example: ClassVar[str] = (
        "patch_map:\n  kind: patch\n  direction: denoising\n  step: all\n  layer: all\n  component: [attn1, attn2, ffn]"
    )
    contrast: ClassVar[bool] = True

    kind: Literal["patch"] = "patch"
    direction: Literal["denoising", "noising", "self"] = "denoising"
    alpha: Annotated[float, Field(ge=-1, le=2)] = 1.0
    donor_sample: Annotated[int, Field(ge=0)] = 0

    @property
    def recipient(self) -> RunName:
        """Corrupted when denoising, else clean."""
        return "corrupted" if self.direction == "denoising" else "clean"

    @property
    def donor(self) -> RunName:
        """Corrupted when noising, else clean."""
        return "corrupted" if self.direction == "noising" else "clean"

    def sources(self) -> tuple[Source, ...]:
        """Return the donor run."""
        return ((RunRef(run=self.donor, sample=self.donor_sample),),)

    def change(
        self, point: Site, value: torch.Tensor, donors: tuple[torch.Tensor, ...], context: RowContext
    ) -> torch.Tensor:
        """Interpolate to the donor; exact at alpha 0 and 1 because ``lerp`` is."""
        return torch.lerp(value, donors[0], self.alpha)
