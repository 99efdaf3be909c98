"""Blocks left out, run twice, or exchanged."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from interventions.base import Intervention, LayerIndex, StepIndex, Window, register, window
from interventions.sites import BlockAt, Branch, Geometry, NoSuchSiteError, RunName


@register("block_skip")
class BlockSkip(Intervention):
    """Leave transformer blocks out, run them twice, or let two of them change places.

    ``mode`` "skip": what enters the block leaves it, in every stream. "repeat": the block runs on its own result with
    the arguments it was called with. "swap": block ``layer`` computes in the place of ``other`` (the next one unless
    given) and the other way round, each with the arguments of the place. ``layers`` consecutive blocks are skipped
    or repeated one by one: repeat gives b0 b0 b1 b1.
    """

    formula: ClassVar[str] = "skip: h_l <- h_{l-1}; repeat: h_l <- B_l(B_l(h_{l-1})); swap: B_l and B_l' exchanged"
    example: ClassVar[str] = "blocks:\n  kind: block_skip\n  mode: [skip, repeat]\n  step: all\n  layer: all"

    kind: Literal["block_skip"] = "block_skip"
    mode: Literal["skip", "repeat", "swap"]
    step: StepIndex
    steps: Window = 1
    layer: LayerIndex
    layers: Window = 1
    other: LayerIndex | None = None
    branch: Branch | Literal["both"] = "both"
    run: RunName = "clean"

    @model_validator(mode="after")
    def _fields_fit(self) -> BlockSkip:
        if self.mode != "swap" and self.other is not None:
            raise ValueError("other names the second block of `mode: swap` and has no meaning with the other modes")
        if self.mode == "swap" and self.layers != 1:
            raise ValueError("layers is a window for skip and repeat; `mode: swap` exchanges layer and other")
        if self.other == self.layer:
            raise ValueError(f"mode swap exchanges two blocks; other is block {self.layer} itself")
        return self

    @property
    def _partner(self) -> int:
        return self.layer + 1 if self.other is None else self.other

    def points(self, geometry: Geometry) -> tuple[BlockAt, ...]:
        """Return every block of the window, or the two that change places, in every asked branch and step."""
        if self.mode == "swap":
            blocks: tuple[int, ...] = tuple(sorted((self.layer, self._partner)))
        else:
            blocks = tuple(window(self.layer, self.layers, geometry.blocks, "layer"))
        branches = geometry.branches if self.branch == "both" else (self.branch,)
        return tuple(
            BlockAt(step, branch, block)
            for step in window(self.step, self.steps, geometry.steps, "step")
            for branch in branches
            for block in blocks
        )

    def program(self, point: BlockAt) -> tuple[int, ...]:
        """Return nothing, the block twice, or the other block; outside of the windows the block itself."""
        inside = self.step <= point.step < self.step + self.steps and self.branch in ("both", point.branch)
        if inside and self.mode == "swap":
            exchanged = {self.layer: self._partner, self._partner: self.layer}
            return (exchanged.get(point.block, point.block),)
        if inside and self.layer <= point.block < self.layer + self.layers:
            return () if self.mode == "skip" else (point.block, point.block)
        return (point.block,)

    def check(self, geometry: Geometry) -> None:
        """Check as well that blocks which change places belong to one list: others take other arguments."""
        super().check(geometry)
        lists = geometry.block_lists
        if self.mode == "swap" and lists and lists[self.layer] != lists[self._partner]:
            same = [b for b in range(geometry.blocks) if lists[b] == lists[self.layer] and b != self.layer]
            raise NoSuchSiteError(
                f"blocks {self.layer} and {self._partner} are of two kinds and cannot change places; block "
                f"{self.layer} can with blocks {same}"
            )
