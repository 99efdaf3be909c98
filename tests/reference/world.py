"""The runs that can be made on one family's pipeline, and which tokens a cell means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from interventions.base import RowContext, RunRef
from tests.reference.bare import Address, Extent, Plan, Trace, extent_of, run
from tests.reference.layouts import Layout

Inputs = tuple[Mapping[str, Any], Mapping[str, torch.Tensor], int]
"""Shared arguments, tensors with one row a run, and the row."""


@dataclass
class World:
    """One family's pipeline, never wrapped, and the runs that can be made on it.

    Attributes
    ----------
    inputs : the inputs of a run, seen from the sample at hand. seed : the integers that identify that sample.
    """

    pipe: Any
    layout: Layout
    inputs: Callable[[RunRef], Inputs]
    seed: tuple[int, ...]
    traces: dict[RunRef, Trace] = field(default_factory=dict)

    @property
    def extent(self) -> Extent:
        """How large a run is."""
        shared, per_run, _ = self.inputs(RunRef("clean"))
        return extent_of(self.pipe, self.layout, shared, per_run["latents"])

    def trace(self, ref: RunRef) -> Trace:
        """Return an undisturbed run, everything inside read."""
        if ref not in self.traces:
            self.traces[ref] = self._run(ref, Plan(), read=True)
        return self.traces[ref]

    def mean(self, refs: Sequence[RunRef], at: Address) -> torch.Tensor:
        """Return an activation's mean over undisturbed runs."""
        return torch.stack([self.trace(ref).sites[at] for ref in refs]).mean(0)

    def draw(self, like: torch.Tensor, purpose: str, *coordinates: int) -> torch.Tensor:
        """Return the random draw that belongs to a purpose and coordinates."""
        context = RowContext(geometry=None, levels=(), seed=self.seed)  # type: ignore[arg-type]
        return context.noise_like(like, purpose, *coordinates)

    def result(self, plan: Plan) -> torch.Tensor:
        """Return the final latents of a run with changes, (C, F, H, W)."""
        return self._run(RunRef(plan.run), plan).final  # type: ignore[arg-type]

    def _run(self, ref: RunRef, plan: Plan, *, read: bool = False) -> Trace:
        shared, per_run, row = self.inputs(ref)
        return run(self.pipe, self.layout, shared, {n: v[row : row + 1] for n, v in per_run.items()}, plan, read=read)


# What cells of several kinds share: windows, branches, and the tokens that are chosen.


def window(start: int, length: int) -> range:
    """Return consecutive indices."""
    return range(start, start + length)


def branches(cell: Any, world: World) -> tuple[str, ...]:
    """Return the guidance branches that a cell means."""
    return world.extent.branches if cell.branch == "both" else (cell.branch,)


def frames(text: str) -> set[int]:
    """Read a set of frames such as 0,2-3."""
    bounds = [[int(n) for n in part.split("-")] for part in text.split(",")]
    return {f for b in bounds for f in range(b[0], b[-1] + 1)}


def chosen(cell: Any, extent: Extent) -> torch.Tensor:
    """Return which tokens a cell means, (frames, height, width)."""
    shown = {cell.frame} if cell.frame is not None else set(range(extent.frames))
    if cell.frames is not None:
        shown = frames(cell.frames)
    top, bottom, left, right = 0, extent.height, 0, extent.width
    if cell.box is not None:
        (top, bottom), (left, right) = (map(int, side.split(":")) for side in cell.box.split(","))
    return torch.tensor(
        [
            [
                [f in shown and top <= y < bottom and left <= x < right for x in range(extent.width)]
                for y in range(extent.height)
            ]
            for f in range(extent.frames)
        ]
    )
