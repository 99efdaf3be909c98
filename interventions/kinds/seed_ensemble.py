"""Seed ensemble: hidden states averaged over runs that differ in their initial noise."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from interventions.base import RowContext, RunRef, Source, StepIndex, register
from interventions.hidden import HiddenIntervention
from interventions.sites import Component, RunName, Site


@register("seed_ensemble")
class SeedEnsemble(HiddenIntervention):
    """Replace an activation by its mean over runs from different initial noise, over a window of blocks.

    The published training-free ensemble: ``seeds`` 3, ``step`` 0 and a window of blocks in the middle. Seed 0 is the
    run that is changed and whose noise goes on; ``seeds`` 1 is the negative control. Each of the runs is averaged as
    recorded: undisturbed by the edits in the window before.

    What follows from that: with component residual and all tokens, every block of the window has its output
    overwritten, so only the last block matters where text enters by cross-attention alone: windows that end alike
    give the same result. With component update the block's input stays, the averaged updates add up along the
    window, and each block of it matters.
    """

    formula: ClassVar[str] = "h <- 1/n sum_i h_i, i over n = seeds runs that differ in their initial noise, i = 0 own"
    example: ClassVar[str] = (
        "ensemble:\n  kind: seed_ensemble\n  seeds: 3\n  step: 0\n  layer: all\n  layers: 2\n"
        "  component: [residual, update]"
    )

    kind: Literal["seed_ensemble"] = "seed_ensemble"
    seeds: Annotated[int, Field(ge=1, le=1024)] = 3
    step: StepIndex = 0
    component: Component = "residual"
    run: RunName = "clean"

    def sources(self) -> tuple[Source, ...]:
        """Return the run itself and those from other noise."""
        return (tuple(RunRef(run=self.run, seed=i) for i in range(self.seeds)),)

    def change(
        self, point: Site, value: torch.Tensor, donors: tuple[torch.Tensor, ...], context: RowContext
    ) -> torch.Tensor:
        """Return the mean over seeds."""
        return donors[0]
