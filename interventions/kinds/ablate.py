"""Ablation: an activation replaced by something that carries nothing of the run at hand."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from interventions.base import RowContext, RunRef, Source, register
from interventions.hidden import HiddenIntervention
from interventions.sites import RunName, Site

BELONGS = {"reference": "mean", "reference_run": "mean", "donor_sample": "resample"}
"""The one ``value`` with which a field has a meaning."""


@register("ablate")
class Ablate(HiddenIntervention):
    """Take away what a component of a block carries: put zero, a mean, another sample or matched noise in its place.

    ``value`` "zero": nothing; of an update this takes the block's work away, of a residual everything that the model
    holds. "mean": the mean of the activation at the same site and token over the run ``reference_run`` of the sweep's
    first ``reference`` problems, which may include the one at hand. "resample": the activation of the same run of
    another problem, ``donor_sample`` further along the sweep. "gaussian": independent draws with the mean and
    the standard deviation that each channel of the row's own activation has over all its tokens, chosen or not, so
    that one frame is replaced by what says nothing of this frame; the variance is that of the population (divided
    by the number of tokens). Both guidance branches get the same draw, so guidance does not amplify it.
    """

    formula: ClassVar[str] = (
        "h <- 0 (zero), mean over reference runs (mean), h of another sample (resample), "
        "mu_c + sd_c eps over own tokens (gaussian)"
    )
    example: ClassVar[str] = (
        "ablation:\n  kind: ablate\n  value: [zero, mean, resample, gaussian]\n  step: all\n  layer: all\n"
        "  component: [attn1, ffn]"
    )

    kind: Literal["ablate"] = "ablate"
    value: Literal["zero", "mean", "resample", "gaussian"]
    reference: Annotated[int, Field(ge=1, le=1024)] = 8
    reference_run: RunName = "clean"
    donor_sample: Annotated[int, Field(ge=1)] = 1
    run: RunName = "clean"

    @model_validator(mode="after")
    def _fields_fit(self) -> Ablate:
        for name, value in BELONGS.items():
            # A field left at, or set to, its default says nothing that could be misread.
            if self.value != value and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no meaning with `value: {self.value}`; it belongs to `value: {value}`")
        return self

    def sources(self) -> tuple[Source, ...]:
        """Return the reference set (mean), the other sample (resample) or nothing."""
        if self.value == "mean":
            return (tuple(RunRef(run=self.reference_run, sample=i, fixed=True) for i in range(self.reference)),)
        if self.value == "resample":
            return ((RunRef(run=self.run, sample=self.donor_sample),),)
        return ()

    def change(
        self, point: Site, value: torch.Tensor, donors: tuple[torch.Tensor, ...], context: RowContext
    ) -> torch.Tensor:
        """Return what takes the activation's place."""
        if self.value == "zero":
            return torch.zeros_like(value)
        if self.value != "gaussian":
            return donors[0]
        purpose = f"ablate {point.component} {point.stream}"
        eps = context.noise_like(value, purpose, point.step, point.block, point.head)
        return value.mean(dim=0) + value.std(dim=0, correction=0) * eps
