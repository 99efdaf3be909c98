"""What a model family declares about itself, and the table of families."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from interventions.families.pixels import Pixels
from interventions.sites import COMPONENTS, Branch, Component, Geometry
from interventions.solvers import describe, levels, solver_of

Calls = tuple[tuple[Branch, ...], ...]
Config = Mapping[str, Any]
LatentLayout = Literal["CFHW", "FCHW", "FHWC", "packed"]
TokenLayout = Literal["rows", "frames", "places"]


class UnknownFamilyError(ValueError):
    """No family adapter declares the pipeline class."""


class UnsupportedModelError(ValueError):
    """A pipeline of a covered class that is built or configured in a way its adapter does not understand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """Where a component of a block is read and written.

    Attributes
    ----------
    path : module inside the block; empty means the block itself.
    end : its output, or its first input (what enters an output projection is the concatenation of heads).
    index : position in a tuple output, None where the output is a tensor.
    part : the stream's tokens in a joint sequence: all of them, the first ones or the last ones. Which tokens are
        video follows from their number; the rest is text.
    """

    path: str = ""
    end: Literal["output", "input"] = "output"
    index: int | None = None
    part: Literal["all", "first", "last"] = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """A softmax attention whose edges can be cut.

    Attributes
    ----------
    path : module inside the block during whose forward the attention is computed.
    order : tokens of its sequence: video alone, joint with the text after or before it, or text as keys only.
    """

    path: str
    order: Literal["video", "video_text", "text_video", "cross"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """One list of transformer blocks of a denoiser.

    Attributes
    ----------
    path : path of the list inside the denoiser. count : key of its length in the denoiser's config, or the length.
    at : the blocks of the list that are meant, where some are built otherwise than the rest.
    taps : components in forward order. A key is a component ("attn1"), a component's heads ("attn1.heads"), or either
        in the text stream ("attn1.text"). "residual" and "residual.text" are the block's outputs; "update" follows.
    attention : attentions whose edges can be cut, by component.
    layout : how rows and tokens share the batch axis: (rows, tokens), (rows x frames, places), (rows x places, frames).
    video_input, text_input : position and name of the block's arguments that "update" is measured from.
    beside : outputs that are neither, such as audio, by index: position and name of the argument they continue. They
        are skipped, repeated and exchanged with their block.
    along : the block's arguments, beside the hidden states, that have an entry for every row of the batch; None where
        that is not known, so that no row can be left out of a block.
    """

    path: str
    count: str | int = "num_layers"
    at: slice = field(default_factory=lambda: slice(None))
    taps: Mapping[str, Tap]
    attention: Mapping[Component, Attention] = field(default_factory=dict)
    layout: TokenLayout = "rows"
    video_input: tuple[int, str] = (0, "hidden_states")
    text_input: tuple[int, str] = (1, "encoder_hidden_states")
    beside: Mapping[int, tuple[int, str]] = field(default_factory=dict)
    along: tuple[tuple[int, str], ...] | None = None

    def length(self, denoiser_config: Config) -> int:
        """Return the number of blocks in the list."""
        return self.count if isinstance(self.count, int) else int(denoiser_config[self.count])

    @property
    def components(self) -> tuple[Component, ...]:
        """Components of these blocks in the video stream, in forward order, "update" and "residual" last."""
        return self._of("")

    @property
    def text_components(self) -> tuple[Component, ...]:
        """The same in the text stream."""
        return self._of(".text")

    def _of(self, detail: str) -> tuple[Component, ...]:
        taps = {key.removesuffix(detail) for key in self.taps if key.endswith(detail)}
        return tuple(c for c in COMPONENTS if c in taps or (c == "update" and "residual" in taps))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockAddress:
    """One block by its place in the forward order of its denoiser: its list, its position there, its path."""

    blocks: Blocks
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The few facts about a pipeline that the engine cannot read off it.

    Attributes
    ----------
    name : how configs and stores call the family. title : models it covers, in words.
    pipelines : names of the diffusers pipeline classes it covers.
    blocks : block lists in forward order. interleaved : whether the lists take turns block by block.
    conditioning : arguments of the denoiser that carry the prompt, one row a run.
    once : arguments of the denoiser with a value for every token that it may be given with one row for all, where every
        row has the same: what it makes of them is then computed once a call and broadcast.
    denoisers : attributes of the pipeline that hold the denoisers, the one for high noise first.
    denoiser_at : which of them computes each step, from the pipeline's config and the timesteps.
    set_steps : set a scheduler's steps as the pipeline does: from scheduler, number of steps, latent (F, H, W).
    given_frames : latent frames that are conditioning, from the pipeline's config.
    calls : denoiser calls of a step with guidance and without. guidance : whether it is on, from the call's arguments.
    guider : whether guidance is on, from the pipeline, where its call is not told.
    guided : the pipeline call's arguments for a guidance scale.
    latent_layout : axes of a row of latents and predictions inside the loop. final_layout : the same for what the
        pipeline returns, where it differs.
    extent : (frames, height, width) of the latents from the pipeline and the call's arguments and latents.
    patch : (frames, height, width) of the latents that one token covers, from the denoiser's config.
    heads : number of heads, from the denoiser's config; 0 where heads cannot be addressed.
    example : arguments of a smallest run with random conditioning, two rows, for the controls: from the pipeline,
        the number of steps and whether guidance is on; shared arguments and per-run tensors.
    encode : prompts to per-run tensors: from the pipeline, prompts, whether guidance is on, and
        a negative prompt in place of the pipeline's own.
    pixels : how videos become latents and back; None where a run cannot be made from prompts alone.
    notes : what a user should know, one sentence.
    """

    name: str
    title: str = ""
    pipelines: tuple[str, ...]
    blocks: tuple[Blocks, ...]
    interleaved: bool = False
    conditioning: tuple[str, ...] = ("encoder_hidden_states",)
    once: tuple[str, ...] = ()
    denoisers: tuple[str, ...] = ("transformer",)
    denoiser_at: Callable[[Config, Sequence[float]], tuple[int, ...]] = lambda config, timesteps: ()
    set_steps: Callable[[Any, int, tuple[int, int, int]], None] = lambda scheduler, steps, shape: (
        scheduler.set_timesteps(steps)
    )
    given_frames: Callable[[Config], int] = lambda config: 0
    calls: Mapping[bool, Calls] = field(
        default_factory=lambda: {True: (("cond",), ("uncond",)), False: (("cond",),)},
    )
    guidance: Callable[[Mapping[str, Any]], bool] = lambda shared: float(shared.get("guidance_scale", 1.0)) > 1
    guider: Callable[[Any], bool] | None = None
    guided: Callable[[float], dict[str, Any]] = lambda scale: {"guidance_scale": scale}
    latent_layout: LatentLayout = "CFHW"
    final_layout: LatentLayout | None = None
    extent: Callable[[Any, Mapping[str, Any], torch.Tensor], tuple[int, int, int]] | None = None
    patch: Callable[[Config], tuple[int, int, int]] = lambda config: tuple(config["patch_size"])  # type: ignore[return-value]
    heads: Callable[[Config], int] = lambda config: int(config["num_attention_heads"])
    example: Callable[[Any, int, bool], tuple[dict[str, Any], dict[str, torch.Tensor]]] | None = None
    encode: Callable[..., dict[str, torch.Tensor]] | None = None
    pixels: Pixels | None = None
    notes: str = ""

    @property
    def denoiser(self) -> str:
        """The first denoiser."""
        return self.denoisers[0]

    def addresses(self, denoiser_config: Config) -> list[BlockAddress]:
        """Return every block of a denoiser in forward order."""
        lists = [
            [BlockAddress(blocks=b, path=f"{b.path}.{i}") for i in range(b.length(denoiser_config))[b.at]]
            for b in self.blocks
        ]
        if self.interleaved:
            return [address for turn in zip(*lists, strict=True) for address in turn]
        return [address for one in lists for address in one]

    def geometry(
        self,
        pipeline_config: Config,
        denoiser_config: Config,
        *,
        scheduler: Any,
        steps: int,
        guidance: bool,
        latent_shape: tuple[int, int, int],
    ) -> Geometry:
        """Return the extent of a run.

        Parameters
        ----------
        pipeline_config, denoiser_config : contents of ``model_index.json`` and of the denoiser's ``config.json``.
        scheduler : a scheduler of the pipeline's class and settings; it is changed.
        steps : solver steps. guidance : whether classifier-free guidance is on.
        latent_shape : (frames, height, width) of the latents.

        Raises
        ------
        UnsupportedSolverError : the scheduler is not understood.
        """
        solver = solver_of(scheduler)
        self.set_steps(scheduler, steps, latent_shape)
        addresses = self.addresses(denoiser_config)
        patch = self.patch(denoiser_config)
        frames, height, width = (n // p for n, p in zip(latent_shape, patch, strict=True))
        components = tuple(c for c in COMPONENTS if any(c in b.components for b in self.blocks))
        taps = {key for b in self.blocks for key in b.taps}
        count = self.heads(denoiser_config)
        heads = tuple(c for c in COMPONENTS if f"{c}.heads" in taps) if count else ()
        denoisers = tuple(d for d in self.denoisers if _present(pipeline_config, d)) or (self.denoiser,)
        return Geometry(
            steps=steps,
            blocks=len(addresses),
            frames=frames,
            given_frames=self.given_frames(pipeline_config),
            height=height,
            width=width,
            frame_patch=patch[0],
            calls=self.calls[guidance],
            components=components,
            block_components=_if_different([a.blocks.components for a in addresses]),
            heads=count if heads else 0,
            head_components=heads,
            text_components=tuple(c for c in COMPONENTS if any(c in b.text_components for b in self.blocks)),
            block_text_components=_if_different([a.blocks.text_components for a in addresses]),
            knockout=tuple(c for c in COMPONENTS if any(c in b.attention for b in self.blocks)),
            block_knockout=_if_different([tuple(a.blocks.attention) for a in addresses]),
            denoisers=denoisers,
            denoiser_at=(
                self.denoiser_at(pipeline_config, [float(t) for t in scheduler.timesteps]) if len(denoisers) > 1 else ()
            ),
            levels=levels(scheduler),
            solver=describe(solver),
            edits=solver.edits,
            block_lists=tuple(self.blocks.index(a.blocks) for a in addresses) if len(self.blocks) > 1 else (),
        )


def _present(pipeline_config: Config, component: str) -> bool:
    value = pipeline_config.get(component)
    return value is not None and tuple(value) != (None, None)


def _if_different(each: list[tuple[Component, ...]]) -> tuple[tuple[Component, ...], ...]:
    return tuple(each) if len(set(each)) > 1 else ()


FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Add a family to the table.

    Raises
    ------
    ValueError : the name is taken.
    """
    if family.name in FAMILIES:
        raise ValueError(f"family {family.name!r} is registered twice")
    FAMILIES[family.name] = family
    return family


def family_of(pipeline_class: str) -> Family:
    """Return the family that covers a diffusers pipeline class.

    Raises
    ------
    UnknownFamilyError : none does; the message lists the classes that are covered.
    """
    for family in FAMILIES.values():
        if pipeline_class in family.pipelines:
            return family
    known = ", ".join(sorted(p for f in FAMILIES.values() for p in f.pipelines))
    raise UnknownFamilyError(
        f"no family adapter covers pipeline class {pipeline_class}. Infer one: "
        "interventions.families.generic.infer(pipe, shared, per_run).source() prints a file for "
        f"interventions/families/; docs/add_your_model.md shows how. Covered: {known}."
    )
