"""Interventions on hidden tokens: which activations and which tokens of them, shared by every kind that edits some."""

from __future__ import annotations

import re
from abc import abstractmethod
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, model_validator

from interventions.base import (
    FrameIndex,
    HeadIndex,
    Intervention,
    LayerIndex,
    Read,
    RowContext,
    RunRef,
    Source,
    StepIndex,
    Window,
    window,
)
from interventions.sites import ALL_HEADS, Branch, Component, Geometry, NoSuchSiteError, Point, Site, Stream

_RANGES = re.compile(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*")
_BOX = re.compile(r"(\d{1,4}):(\d{1,4}),(\d{1,4}):(\d{1,4})")


def _is_ranges(text: str) -> str:
    plain = text.replace(" ", "")
    parts = [part.partition("-") for part in plain.split(",")]
    if not _RANGES.fullmatch(plain) or any(dash and int(first) > int(last) for first, dash, last in parts):
        raise ValueError(f"{text[:40]!r} is not a set of frames such as 2-5 or 0,3-4")
    return plain


def _is_box(text: str) -> str:
    match = _BOX.fullmatch(text.replace(" ", ""))
    if not match or int(match[1]) >= int(match[2]) or int(match[3]) >= int(match[4]):
        raise ValueError(f"{text[:40]!r} is not a box of tokens such as 0:4,2:6 (top:bottom,left:right, ends excluded)")
    return text.replace(" ", "")


FrameSet = Annotated[str, AfterValidator(_is_ranges)]
"""Frames as text, "2-5" or "0,3-4": one value, so that a list of them can be swept."""
Box = Annotated[str, AfterValidator(_is_box)]
"""A spatial box in tokens, "top:bottom,left:right", ends excluded."""


def frames_of(text: str) -> tuple[int, ...]:
    """Return the frames that a frame set names, in order and once each."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


class Region(Intervention):
    """The part of a frame sequence that an intervention touches: one frame or a set of them, and a spatial box."""

    frame: FrameIndex | None = None
    frames: FrameSet | None = None
    box: Box | None = None

    @model_validator(mode="after")
    def _one_way_to_name_frames(self) -> Region:
        if self.frame is not None and self.frames is not None:
            raise ValueError("give frame (one, may be swept) or frames (a set), not both")
        return self

    @property
    def whole(self) -> bool:
        """Whether every token of every frame is meant."""
        return self.frame is None and self.frames is None and self.box is None

    def chosen_frames(self, geometry: Geometry) -> tuple[int, ...]:
        """Return the frames that are meant; all of them unless the fields say otherwise."""
        if self.frame is not None:
            return (self.frame,)
        return frames_of(self.frames) if self.frames is not None else tuple(range(geometry.frames))

    def chosen_box(self, geometry: Geometry) -> tuple[int, int, int, int]:
        """Return (top, bottom, left, right) in tokens."""
        match = _BOX.fullmatch(self.box or f"0:{geometry.height},0:{geometry.width}")
        assert match is not None
        top, bottom, left, right = map(int, match.groups())
        return top, bottom, left, right

    def mask(self, geometry: Geometry) -> torch.Tensor:
        """Return which tokens are meant: booleans (frames, height, width)."""
        chosen = torch.zeros(geometry.frames, geometry.height, geometry.width, dtype=torch.bool)
        top, bottom, left, right = self.chosen_box(geometry)
        chosen[list(self.chosen_frames(geometry)), top:bottom, left:right] = True
        return chosen

    def check(self, geometry: Geometry) -> None:
        """Check the region as well as the points."""
        self.check_region(geometry)
        super().check(geometry)

    def check_region(self, geometry: Geometry) -> None:
        """Check that the frames and the box exist.

        Raises
        ------
        NoSuchSiteError : they do not; the message says what there is.
        """
        if self.frames is not None and max(frames_of(self.frames)) >= geometry.frames:
            raise NoSuchSiteError(f"frames {self.frames}: this run has frames 0 to {geometry.frames - 1}")
        if self.frame is not None and self.frame >= geometry.frames:
            raise NoSuchSiteError(f"frame {self.frame}: this run has frames 0 to {geometry.frames - 1}")
        _, bottom, _, right = self.chosen_box(geometry)
        if bottom > geometry.height or right > geometry.width:
            raise NoSuchSiteError(f"box {self.box}: a frame has {geometry.height} x {geometry.width} tokens")


class HiddenIntervention(Region):
    """An edit of one component of one block, or of windows of steps and blocks, on some of its tokens.

    Fields
    ------
    step, steps : first step and number of consecutive steps. layer, layers : the same for blocks.
    component : what of the block. head : one head of an attention component, None for the whole.
    stream : video or text tokens. frame, frames, box : some video tokens only.
    branch : one guidance branch or both. denoiser : the expert that must compute the step, checked.

    Which run is changed is the kind's to say: a field ``run``, or a ``recipient`` of its own.
    """

    step: StepIndex
    steps: Window = 1
    layer: LayerIndex
    layers: Window = 1
    component: Component = "update"
    head: HeadIndex | None = None
    stream: Stream = "video"
    branch: Branch | Literal["both"] = "both"
    denoiser: str | None = None

    @model_validator(mode="after")
    def _tokens_fit(self) -> HiddenIntervention:
        if self.stream == "text" and not self.whole:
            raise ValueError("frame, frames and box choose video tokens; they have no meaning with `stream: text`")
        if self.head is not None and self.component not in ("attn1", "attn2"):
            raise ValueError(f"head needs component attn1 or attn2, got {self.component}")
        return self

    def points(self, geometry: Geometry) -> tuple[Site, ...]:
        """Return the component of every block, in every asked branch, at every step of the windows."""
        branches = geometry.branches if self.branch == "both" else (self.branch,)
        head = ALL_HEADS if self.head is None else self.head
        return tuple(
            Site(step, branch, block, self.component, self.stream, head)
            for step in window(self.step, self.steps, geometry.steps, "step")
            for branch in branches
            for block in window(self.layer, self.layers, geometry.blocks, "layer")
        )

    def sources(self) -> tuple[Source, ...]:
        """Return where donor values come from, one for each donor that ``change`` takes."""
        return ()

    def reads(self, geometry: Geometry) -> tuple[Read, ...]:
        """Return a read for every site and source."""
        return tuple(Read(point, source) for point in self.points(geometry) for source in self.sources())

    def references(self, geometry: Geometry) -> frozenset[RunRef]:
        """Return the runs of every source."""
        return frozenset(ref for source in self.sources() for ref in source)

    def check(self, geometry: Geometry) -> None:
        """Check the region, the windows and the expert; what a block has does not depend on the step."""
        self.check_region(geometry)
        window(self.step, self.steps, geometry.steps, "step")
        for point in self.model_copy(update={"steps": 1}).points(geometry):
            geometry.require(point)
        for step in range(self.step, self.step + self.steps) if self.denoiser else ():
            if geometry.denoiser(step) != self.denoiser:
                steps = {d: [s for s in range(geometry.steps) if geometry.denoiser(s) == d] for d in geometry.denoisers}
                have = "; ".join(f"{d} computes steps {s}" for d, s in steps.items())
                raise NoSuchSiteError(f"step {step} is not computed by {self.denoiser!r}: {have}.")

    def apply(self, point: Point, value: torch.Tensor, context: RowContext) -> torch.Tensor:
        """Return ``change`` on the chosen tokens and ``value`` on the others."""
        assert isinstance(point, Site)
        donors = tuple(context.donors[Read(point, source)].to(value) for source in self.sources())
        changed = self.change(point, value, donors, context)
        if self.whole:
            return changed
        mask = self.mask(context.geometry).flatten().to(value.device)
        return torch.where(mask[:, None], changed, value)

    @abstractmethod
    def change(
        self, point: Site, value: torch.Tensor, donors: tuple[torch.Tensor, ...], context: RowContext
    ) -> torch.Tensor:
        """Return the new activation, (tokens, channels), as if every token were chosen.

        Parameters
        ----------
        donors : one tensor for each of ``sources``, of the shape of ``value``.
        """


class LatentIntervention(Region):
    """An edit of the latents that enter one step, or each step of a window, in some frames or a box.

    Fields
    ------
    step, steps : first step and number of consecutive steps. frame, frames, box : some of the latents only.
    """

    step: StepIndex
    steps: Window = 1

    def latent_mask(self, value: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """Return which latents are meant, (1, F, H, W), for latents (C, F, H, W)."""
        mask = self.mask(geometry)
        for axis, extent in enumerate(value.shape[1:]):
            mask = mask.repeat_interleave(extent // mask.shape[axis], dim=axis)
        return mask[None].to(value.device)

    def restrict(self, changed: torch.Tensor, value: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """Return ``changed`` where latents are meant and ``value`` elsewhere."""
        return changed if self.whole else torch.where(self.latent_mask(value, geometry), changed, value)


def by_frame(value: Any, geometry: Geometry) -> torch.Tensor:
    """Return a token sequence (tokens, channels) as (frames, tokens per frame, channels)."""
    frames: torch.Tensor = value.unflatten(0, (geometry.frames, -1))
    return frames
