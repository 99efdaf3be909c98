"""Attention edges cut between latent frames, or from video to text."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from interventions.base import FrameIndex, HeadIndex, Intervention, LayerIndex, StepIndex, Window, register, window
from interventions.edges import Edges, Pattern
from interventions.hidden import FrameSet, frames_of
from interventions.sites import AttentionAt, Branch, Geometry, NoSuchSiteError, RunName


@register("knockout")
class Knockout(Intervention):
    """Cut edges of an attention before its softmax, so that the remaining keys share the whole weight.

    ``pattern`` "causal": frames read themselves and earlier ones. "anti_causal": themselves and later ones. "local":
    frames at most ``reach`` away. "from_frames": no other frame reads ``frames`` (or the one ``frame``). "to_frames":
    those frames read only themselves. "between": the frames ``queries`` do not read ``frames``. "text": no video
    token reads text; where text enters by cross-attention alone no key is left, and the attention gives zero before
    its output projection. All but "text" leave text keys in place. ``component`` is attn1, and for "text" the
    attention that reads text, unless given. ``head`` cuts one head only.
    """

    formula: ClassVar[str] = "softmax(q k / sqrt(d)) over the keys that the pattern leaves; 0 where it leaves none"
    example: ClassVar[str] = (
        "frame_edges:\n  kind: knockout\n  pattern: [causal, anti_causal]\n  step: all\n  layer: all"
    )

    kind: Literal["knockout"] = "knockout"
    pattern: Pattern
    step: StepIndex
    steps: Window = 1
    layer: LayerIndex
    layers: Window = 1
    component: Literal["attn1", "attn2"] | None = None
    head: HeadIndex | None = None
    reach: Annotated[int, Field(ge=0)] | None = None
    frame: FrameIndex | None = None
    frames: FrameSet | None = None
    queries: FrameSet | None = None
    branch: Branch | Literal["both"] = "both"
    run: RunName = "clean"

    @model_validator(mode="after")
    def _fields_fit(self) -> Knockout:
        named = (self.frame is not None) + (self.frames is not None)
        if named != (self.pattern in ("from_frames", "to_frames", "between")):
            raise ValueError(
                "patterns from_frames, to_frames and between need either frame (one, may be swept) or frames (a set); "
                "the other patterns take neither"
            )
        if (self.pattern == "between") != (self.queries is not None):
            raise ValueError("queries is needed with `pattern: between` and has no meaning with the other patterns")
        if (self.pattern == "local") != (self.reach is not None):
            raise ValueError("reach is needed with `pattern: local` and has no meaning with the other patterns")
        if self.pattern != "text" and self.component == "attn2":
            raise ValueError(f"attn2 reads text, so it has no edges between frames: {self.pattern} needs attn1")
        return self

    def attention(self, geometry: Geometry) -> Literal["attn1", "attn2"]:
        """Return the attention whose edges are cut."""
        if self.component is not None:
            return self.component
        return "attn2" if self.pattern == "text" and "attn2" in geometry.knockout else "attn1"

    def points(self, geometry: Geometry) -> tuple[AttentionAt, ...]:
        """Return the attention of every block of the windows, in every asked branch."""
        branches = geometry.branches if self.branch == "both" else (self.branch,)
        return tuple(
            AttentionAt(step, branch, block, self.attention(geometry))
            for step in window(self.step, self.steps, geometry.steps, "step")
            for branch in branches
            for block in window(self.layer, self.layers, geometry.blocks, "layer")
        )

    @property
    def edges(self) -> Edges:
        """The edges that are cut at every point."""
        frames = (self.frame,) if self.frame is not None else frames_of(self.frames) if self.frames else ()
        return Edges(
            pattern=self.pattern,
            window=1 if self.reach is None else self.reach,
            frames=frames,
            queries=frames_of(self.queries) if self.queries else (),
            heads=None if self.head is None else (self.head,),
        )

    def cut(self, point: AttentionAt, geometry: Geometry) -> tuple[Edges, ...]:
        """Return the pattern's edges."""
        edges = self.edges
        return (replace(edges, window=min(edges.window, geometry.frames)),)

    def check(self, geometry: Geometry) -> None:
        """Check frames, head and text keys as well as the points."""
        beyond = [f for f in (*self.edges.frames, *self.edges.queries) if f >= geometry.frames]
        if beyond:
            raise NoSuchSiteError(
                f"pattern {self.pattern}: no frame {beyond[0]}, frames are 0 to {geometry.frames - 1}"
            )
        if self.head is not None and self.head >= geometry.heads:
            have = f"heads 0 to {geometry.heads - 1}" if geometry.heads else "no heads that can be addressed"
            raise NoSuchSiteError(f"no head {self.head}: this model has {have}")
        if self.pattern == "text" and self.component == "attn1" and "attn2" in geometry.knockout:
            raise NoSuchSiteError(
                "attn1 of this model reads no text: text enters by cross-attention, `component: attn2`"
            )
        super().check(geometry)
