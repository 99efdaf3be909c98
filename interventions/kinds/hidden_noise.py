"""Noise on hidden tokens, in units of what each channel varies by over the chosen tokens."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from interventions.base import RowContext, register
from interventions.hidden import HiddenIntervention
from interventions.sites import Geometry, NoSuchSiteError, RunName, Site


@register("hidden_noise")
class HiddenNoise(HiddenIntervention):
    """Add Gaussian noise to a component of a block, in units of what each channel varies by over the chosen tokens.

    ``strength`` is the ratio of noise to signal: standard deviations of the row's own activation, channel by channel,
    over the tokens that are chosen (population variance: divided by their number). The draw depends on the sample,
    the step, the block and the component; a region gets its part of the draw for all tokens, and both guidance
    branches get the same, so guidance does not amplify it.
    """

    formula: ClassVar[str] = "h <- h + strength sd_c(h) eps, sd_c over the chosen tokens of channel c"
    example: ClassVar[str] = (
        "hidden_noise:\n  kind: hidden_noise\n  strength: [0.25, 1.0]\n  step: all\n  layer: all\n  component: residual"
    )

    kind: Literal["hidden_noise"] = "hidden_noise"
    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    run: RunName = "clean"

    def check(self, geometry: Geometry) -> None:
        """Check that the region has tokens to vary over as well."""
        super().check(geometry)
        if self.stream == "video" and int(self.mask(geometry).sum()) < 2:
            raise NoSuchSiteError("this region is a single token, over which nothing varies: its noise would be zero")

    def change(
        self, point: Site, value: torch.Tensor, donors: tuple[torch.Tensor, ...], context: RowContext
    ) -> torch.Tensor:
        """Return the activation with noise on every token."""
        chosen = value if self.whole else value[self.mask(context.geometry).flatten().to(value.device)]
        purpose = f"hidden_noise {point.component} {point.stream}"
        eps = context.noise_like(value, purpose, point.step, point.block, point.head)
        return value + self.strength * chosen.std(dim=0, correction=0) * eps
