"""The prompt exchanged in the middle of a run: another run's conditioning from a step on."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from interventions.base import Intervention, Read, RowContext, RunRef, StepIndex, Window, register, window
from interventions.sites import Branch, Geometry, Point, PromptAt, RunName


@register("prompt_swap")
class PromptSwap(Intervention):
    """Give the denoiser the prompt of another run, from ``step`` to the end or for ``steps`` steps.

    Everything that carries the prompt into the denoiser is exchanged together: embeddings, masks, pooled vectors.
    ``donor`` "pair": the other run of the contrast pair. "sample": the same run of another problem, ``offset`` problems
    further (1 unless given). ``branch``: the conditional branch, the unconditional one, or both.
    """

    formula: ClassVar[str] = (
        "v_t <- v(x_t, prompt of the donor run) for t in [step, step + steps), to the end by default"
    )
    example: ClassVar[str] = "late_prompt:\n  kind: prompt_swap\n  step: all"

    kind: Literal["prompt_swap"] = "prompt_swap"
    donor: Literal["pair", "sample"] = "pair"
    offset: Annotated[int, Field(ge=1)] | None = None
    step: StepIndex
    steps: Window | None = None
    branch: Branch | Literal["both"] = "cond"
    run: RunName = "clean"

    @model_validator(mode="after")
    def _a_pair_has_one_other_run(self) -> PromptSwap:
        if self.donor == "pair" and self.offset is not None:
            raise ValueError("offset counts samples; it has no meaning with `donor: pair`")
        return self

    def points(self, geometry: Geometry) -> tuple[PromptAt, ...]:
        """Return the prompt of the branches at every step of the window."""
        branches = geometry.branches if self.branch == "both" else (self.branch,)
        length = max(1, geometry.steps - self.step) if self.steps is None else self.steps
        steps = window(self.step, length, geometry.steps, "step")
        return tuple(PromptAt(step, branch) for step in steps for branch in branches)

    def reads(self, geometry: Geometry) -> tuple[Read, ...]:
        """Return the donor's prompt, one read a branch: a run has the same prompt at every step."""
        return tuple(dict.fromkeys(self._read(point.branch) for point in self.points(geometry)))

    def _read(self, branch: Branch) -> Read:
        other: RunName = "corrupted" if self.run == "clean" else "clean"
        ref = RunRef(other) if self.donor == "pair" else RunRef(self.run, sample=self.offset or 1)
        return Read(PromptAt(self.step, branch), (ref,))

    def apply(self, point: Point, value: dict[str, torch.Tensor], context: RowContext) -> dict[str, Any]:
        """Return the donor's conditioning under the same names.

        Raises
        ------
        ValueError : the two prompts have other shapes, so that they cannot share a batch.
        """
        assert isinstance(point, PromptAt)
        donor = context.donors[self._read(point.branch)]
        for name, own in value.items():
            if name not in donor or donor[name].shape != own.shape:
                found = tuple(donor[name].shape) if name in donor else "missing"
                raise ValueError(
                    f"prompt_swap at step {point.step}: {name} of the donor run is {found}, of this run "
                    f"{tuple(own.shape)}. Give both prompts the same number of tokens (pad them alike)."
                )
        return {name: donor[name].to(own) for name, own in value.items()}
