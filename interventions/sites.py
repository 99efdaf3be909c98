"""Where an intervention acts: the coordinates of a run, its geometry, and the points an engine can edit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Component = Literal["residual", "update", "attn1", "attn2", "ffn"]
Branch = Literal["cond", "uncond"]
Stream = Literal["video", "text"]
RunName = Literal["clean", "corrupted"]

COMPONENTS: tuple[Component, ...] = ("attn1", "attn2", "ffn", "update", "residual")
"""Components of a block in the order in which one forward reaches them."""
RUNS: tuple[RunName, ...] = ("clean", "corrupted")
ALL_HEADS = -1


class NoSuchSiteError(ValueError):
    """The model or the run does not have what an intervention names; the message says what there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The extent of every coordinate of a run, known before any forward.

    Attributes
    ----------
    steps : solver steps of a run.
    blocks : transformer blocks of a denoiser, over all its block lists in forward order.
    frames : latent frames in tokens; the first ``given_frames`` are conditioning and never denoised.
    height, width : tokens along each side of one frame.
    frame_patch : frames of the latents that share one token frame.
    calls : the denoiser calls of a step, each with the guidance branches in the order of its rows.
    components : components that any block can address. block_components : the same for each block, where they differ.
    heads : attention heads of a block, 0 if none can be addressed. head_components : attentions that have them.
    text_components : components that carry text tokens; empty where text enters by cross-attention alone.
    block_text_components : the same for each block, where they differ.
    knockout : attentions whose edges between frames can be cut. block_knockout : the same for each block.
    denoisers : the experts. denoiser_at : which of them computes each step; empty means the first, always.
    levels : (alpha, sigma) of the latents x = alpha x0 + sigma eps entering each step, then of the result.
    solver : class of the solver and its order. edits : changes of the step list that it allows.
    block_lists : which list of the denoiser each block belongs to; empty where there is one.
    """

    steps: int
    blocks: int
    frames: int
    given_frames: int
    height: int
    width: int
    frame_patch: int = 1
    calls: tuple[tuple[Branch, ...], ...] = (("cond",),)
    components: tuple[Component, ...] = COMPONENTS
    block_components: tuple[tuple[Component, ...], ...] = ()
    heads: int = 0
    head_components: tuple[Component, ...] = ()
    text_components: tuple[Component, ...] = ()
    block_text_components: tuple[tuple[Component, ...], ...] = ()
    knockout: tuple[Component, ...] = ()
    block_knockout: tuple[tuple[Component, ...], ...] = ()
    denoisers: tuple[str, ...] = ("transformer",)
    denoiser_at: tuple[int, ...] = ()
    levels: tuple[tuple[float, float], ...] = ()
    solver: str = ""
    edits: tuple[str, ...] = ("drop", "repeat", "swap")
    block_lists: tuple[int, ...] = ()

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Guidance branches of a step, "cond" first."""
        return tuple(sorted({b for call in self.calls for b in call}))

    @property
    def tokens_per_frame(self) -> int:
        """Tokens that one latent frame occupies, a contiguous slice of the sequence."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Video tokens of a run."""
        return self.frames * self.tokens_per_frame

    @property
    def generated_frames(self) -> tuple[int, ...]:
        """Indices of the latent frames that the model generates."""
        return tuple(range(self.given_frames, self.frames))

    def denoiser(self, step: int) -> str:
        """Return the name of the denoiser that computes a step."""
        return self.denoisers[self.denoiser_at[step] if self.denoiser_at else 0]

    def call_of(self, branch: Branch) -> int:
        """Return which denoiser call of a step computes a branch."""
        return next(k for k, call in enumerate(self.calls) if branch in call)

    def components_of(self, block: int, stream: Stream = "video") -> tuple[Component, ...]:
        """Return the components that one block can address in a stream."""
        if stream == "text":
            return self.block_text_components[block] if self.block_text_components else self.text_components
        return self.block_components[block] if self.block_components else self.components

    def knockout_of(self, block: int) -> tuple[Component, ...]:
        """Return the attentions of one block whose edges can be cut."""
        return self.block_knockout[block] if self.block_knockout else self.knockout

    def indices(self, coordinate: str) -> tuple[int, ...]:
        """Return every legal index along ``step``, ``layer``, ``frame`` or ``head``.

        Raises
        ------
        KeyError : ``coordinate`` is not one of the four.
        """
        return {
            "step": tuple(range(self.steps)),
            "layer": tuple(range(self.blocks)),
            "frame": self.generated_frames,
            "head": tuple(range(self.heads)),
        }[coordinate]

    def require(self, point: Point) -> None:
        """Check that a point exists.

        Raises
        ------
        NoSuchSiteError : the model or the run has no such point; the message says what there is.
        """
        last = self.steps if isinstance(point, LatentsAt) else self.steps - 1
        branch = getattr(point, "branch", self.branches[0])
        block = getattr(point, "block", 0)
        if not (0 <= point.step <= last and 0 <= block < self.blocks and branch in self.branches):
            raise NoSuchSiteError(
                f"no such site: {point}. There are steps 0 to {self.steps - 1}, blocks 0 to {self.blocks - 1}, "
                f"branches {', '.join(self.branches)} and components {', '.join(self.components)}."
            )
        if isinstance(point, Site):
            self._require_component(point)
        if isinstance(point, AttentionAt) and point.component not in self.knockout_of(block):
            raise NoSuchSiteError(_no_knockout(self, point))

    def _require_component(self, site: Site) -> None:
        if site.stream == "text" and not self.text_components:
            raise NoSuchSiteError(
                f"no such site: {site}. This model carries text tokens in no component: text enters it by "
                "cross-attention alone."
            )
        have = self.components_of(site.block, site.stream)
        if site.component not in have:
            raise NoSuchSiteError(
                f"no such site: {site}. Block {site.block} has components {', '.join(have) or 'none'} for "
                f"{site.stream} tokens; {_blocks_with(self, site.component, site.stream)}."
            )
        if site.head != ALL_HEADS and not (
            site.component in self.head_components and 0 <= site.head < self.heads and site.stream == "video"
        ):
            which = f"heads 0 to {self.heads - 1} of {', '.join(self.head_components)}" if self.heads else "no heads"
            raise NoSuchSiteError(f"no such site: {site}. This model has {which}, for video tokens.")


@dataclass(frozen=True, slots=True, order=True)
class LatentsAt:
    """The latents that enter solver step ``step``; ``step`` equal to the number of steps means the final latents."""

    step: int


@dataclass(frozen=True, slots=True, order=True)
class PredictionAt:
    """The guided prediction that the solver receives at ``step``."""

    step: int


@dataclass(frozen=True, slots=True, order=True)
class OutputAt:
    """What the denoiser returns for one guidance branch at ``step``, before guidance."""

    step: int
    branch: Branch


@dataclass(frozen=True, slots=True, order=True)
class PromptAt:
    """The prompt conditioning that the denoiser receives for one branch at ``step``: tensors by argument name."""

    step: int
    branch: Branch


@dataclass(frozen=True, slots=True, order=True)
class BlockAt:
    """The computation of one block, in one branch of one step."""

    step: int
    branch: Branch
    block: int


@dataclass(frozen=True, slots=True, order=True)
class AttentionAt:
    """The attention edges of one block's self- or cross-attention, in one branch of one step."""

    step: int
    branch: Branch
    block: int
    component: Component = "attn1"


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One activation of the denoiser: a component of a block, in one branch of one step.

    ``head`` names one head of an attention component: its slice of what enters the output projection.
    """

    step: int
    branch: Branch
    block: int
    component: Component
    stream: Stream = "video"
    head: int = ALL_HEADS


Point = LatentsAt | PredictionAt | OutputAt | PromptAt | BlockAt | AttentionAt | Site


def _blocks_with(geometry: Geometry, component: Component, stream: Stream) -> str:
    blocks = [b for b in range(geometry.blocks) if component in geometry.components_of(b, stream)]
    return f"{component} exists in blocks {blocks}" if blocks else f"no block has {component}"


def _no_knockout(geometry: Geometry, point: AttentionAt) -> str:
    blocks = [b for b in range(geometry.blocks) if point.component in geometry.knockout_of(b)]
    where = f"It can be cut in blocks {blocks}" if blocks else "No block of this model has such attention"
    return f"block {point.block} has no softmax attention {point.component} whose edges could be cut. {where}."
