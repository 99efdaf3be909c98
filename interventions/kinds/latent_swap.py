"""Latents of another run put in the place of a run's own: its pair, another seed's or another sample's."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from interventions.base import Read, RowContext, RunRef, Source, register, window
from interventions.hidden import LatentIntervention
from interventions.sites import Geometry, LatentsAt, Point, RunName


@register("latent_swap")
class LatentSwap(LatentIntervention):
    """Replace, or interpolate towards, the latents that enter a step by those of another run at the same step.

    ``donor`` "pair": the other run of the contrast pair. "seed": the same prompt from other initial noise. "sample":
    the same run of another problem. ``offset`` counts seeds or problems from the own one and is 1 unless given. Every
    later step belongs to the recipient's prompt.
    """

    formula: ClassVar[str] = "x_s <- (1 - alpha) x_s + alpha x_s of the donor run, on the chosen frames or box"
    example: ClassVar[str] = "swap:\n  kind: latent_swap\n  donor: [pair, seed]\n  step: all"

    kind: Literal["latent_swap"] = "latent_swap"
    donor: Literal["pair", "seed", "sample"] = "pair"
    offset: Annotated[int, Field(ge=1)] | None = None
    alpha: Annotated[float, Field(ge=-1, le=2)] = 1.0
    run: RunName = "clean"

    @model_validator(mode="after")
    def _a_pair_has_one_other_run(self) -> LatentSwap:
        if self.donor == "pair" and self.offset is not None:
            raise ValueError("offset counts seeds or samples; it has no meaning with `donor: pair`")
        return self

    @property
    def source(self) -> Source:
        """The donor run."""
        offset = self.offset or 1
        if self.donor == "pair":
            return (RunRef("corrupted" if self.run == "clean" else "clean"),)
        return (RunRef(self.run, seed=offset) if self.donor == "seed" else RunRef(self.run, sample=offset),)

    def points(self, geometry: Geometry) -> tuple[LatentsAt, ...]:
        """Return the latents entering every step of the window; the final latents count as one more."""
        return tuple(LatentsAt(s) for s in window(self.step, self.steps, geometry.steps + 1, "step"))

    def reads(self, geometry: Geometry) -> tuple[Read, ...]:
        """Return the donor's latents at the same steps."""
        return tuple(Read(point, self.source) for point in self.points(geometry))

    def apply(self, point: Point, value: torch.Tensor, context: RowContext) -> torch.Tensor:
        """Interpolate to the donor; exact at alpha 0 and 1 because ``lerp`` is."""
        donor = context.donors[Read(point, self.source)].to(value)
        return self.restrict(torch.lerp(value, donor, self.alpha), value, context.geometry)
