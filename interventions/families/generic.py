"""Adapters inferred from a pipeline of an unknown class, by short bare runs with plain hooks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn

from interventions.families.facts import (
    Boundary,
    Constant,
    Drawn,
    Guidance,
    PackedExtent,
    Scales,
    StepsAsSeen,
)
from interventions.families.family import Blocks, Family, TokenLayout
from interventions.families.source import default_of, source_of
from interventions.probing.anatomy import Anatomy, Dissection
from interventions.probing.branches import Branches, find_branches, find_guidance
from interventions.probing.forward import Where
from interventions.probing.grid import AXES, Grid, find_grid, packed_in_order
from interventions.probing.lists import BlockList, count_of, find_block_lists
from interventions.probing.run import InferenceError, Probe
from interventions.probing.steps import find_steps

__all__ = ["Inference", "InferenceError", "infer"]


@dataclass(frozen=True, slots=True)
class Inference:
    """An inferred adapter, and how far it goes.

    Attributes
    ----------
    family : the adapter; hand it to an engine. verified : what the runs have shown, in sentences.
    unverified : what they have not, what is left out and why, in sentences.
    """

    family: Family
    verified: tuple[str, ...]
    unverified: tuple[str, ...]

    def source(self) -> str:
        """Return the adapter as a Python file, to be saved in ``interventions/families``."""
        return source_of(self.family, self.unverified)


def infer(pipe: Any, shared: Mapping[str, Any], per_run: Mapping[str, torch.Tensor]) -> Inference:
    """Infer the adapter of a diffusers video pipeline from short runs of it.

    Parameters
    ----------
    pipe : the pipeline; it is left as it was. shared : arguments of a small run, with guidance on if it has any.
    per_run : ``latents`` and the prompts' tensors, two rows each.

    Raises
    ------
    InferenceError : something that every adapter must declare could not be found; the message says what was seen.
    UnsupportedSolverError : the pipeline's scheduler is not understood.
    """
    return _Inferring(Probe(pipe, shared, per_run)).inference()


class _Inferring:
    """The facts as they are found, each with what was seen of it."""

    def __init__(self, probe: Probe) -> None:
        self.probe, self.verified, self.unverified = probe, [], []  # type: ignore[var-annotated]
        self.found: dict[str, Any] = {}

    def inference(self) -> Inference:
        name = type(self.probe.pipe).__name__
        self.loop = self.probe.loop()
        self._denoisers()
        branches = self._branches()
        self.lists, self.interleaved = find_block_lists(self.probe, self.denoiser, self.unverified)
        grid = self._grid(branches)
        self._steps(grid.shape)
        self._blocks(branches, grid)
        self._returned(grid)
        self._example()
        self.unverified += [
            "encode and pixels are not declared: how prompts become tensors, and videos latents, is written by hand.",
            f"All of this was seen on one size, {_by(grid.shape)} latents, and one checkpoint.",
        ]
        family = Family(
            name=_snake(name.removesuffix("Pipeline")), title=f"Inferred from {name}", pipelines=(name,), **self.found
        )
        return Inference(family, tuple(self.verified), tuple(self.unverified))

    @property
    def denoiser(self) -> nn.Module:
        return self.probe.modules[self.found["denoisers"][0]]

    def _denoisers(self) -> None:
        later = self.loop.of_step(1)
        if not later:
            raise InferenceError("no module of the pipeline is called between two solver steps, so none denoises")
        # What precedes the first step's calls, such as connectors, runs once and is no denoiser.
        first = self.loop.of_step(0)[-len(later) :]
        names = tuple(dict.fromkeys(call.denoiser for call in (*first, *later)))
        modules = self.probe.modules
        kin = tuple(n for n, m in modules.items() if type(m) is type(modules[names[0]]))
        if not set(names) <= set(kin):
            raise InferenceError(f"a step calls {', '.join(names)}, which are not experts of one class")
        self.found["denoisers"], self.first = names, first
        if len(kin) > 1:
            self._experts(len(later))
        denoiser = modules[names[0]]
        if not isinstance(getattr(denoiser, "config", None), Mapping):
            raise InferenceError(f"{names[0]} has no config. Make it a diffusers ModelMixin and ConfigMixin.")
        found = " and ".join(self.found["denoisers"])
        self.verified.append(f"The denoiser is {found}, with {_count(len(later), 'call')} a step.")

    def _experts(self, per_step: int) -> None:
        steps = 8
        loop = self.probe.loop(steps=steps)
        of_step = [{call.denoiser for call in loop.of_step(step)[-per_step:]} for step in range(steps)]
        names = tuple(dict.fromkeys(name for each in of_step for name in each))
        if any(len(each) != 1 for each in of_step) or len(names) > 2:
            raise InferenceError(f"the denoisers of {steps} steps are {of_step}: one expert a step, and two at most")
        self.found["denoisers"] = names
        if len(names) == 1:
            return
        seen = tuple(names.index(next(iter(each))) for each in of_step)
        config, training = self.probe.pipe.config, int(self.probe.pipe.scheduler.config.num_train_timesteps)
        boundaries = [Boundary(name, training) for name, value in config.items() if isinstance(value, float)]
        fitting = [boundary for boundary in boundaries if boundary(config, loop.timesteps) == seen]
        if len(fitting) != 1:
            raise InferenceError(f"experts {names} take the steps {seen}, which no entry of the pipeline's config says")
        self.found["denoiser_at"] = fitting[0]
        self.unverified.append(f"{names[1]} is taken to be built like {names[0]}: only {names[0]} was looked into.")

    def _branches(self) -> Branches:
        branches = find_branches(self.probe, self.first)
        guidance, calls = find_guidance(self.probe, self.first[0].denoiser, branches)
        self.found |= {"conditioning": branches.conditioning, "calls": calls, "guidance": guidance}
        self.unverified += branches.doubts
        for on, each in calls.items():
            rows = "; ".join("[" + ", ".join(call) + "]" for call in each)
            self.verified.append(f"With guidance {'on' if on else 'off'} a step has denoiser calls with rows {rows}.")
        scales = guidance.defaults if isinstance(guidance, Guidance) else guidance.arguments
        self.found["guided"] = Scales(tuple(scales))
        if not isinstance(guidance, Guidance):
            self.unverified.append(
                f"Guidance was {'on' if guidance.on else 'off'} and nothing in the call's arguments switches it: only "
                "these calls are known."
            )
        if not branches.conditioning:
            raise InferenceError(
                "no keyword of the denoiser follows the prompts row by row: give two different prompts"
            )
        self.verified.append(f"The prompt enters the denoiser as {', '.join(branches.conditioning)}.")
        return branches

    def _grid(self, branches: Branches) -> Grid:
        firsts = [(one.modules[0], one.video) for one in self.lists]
        slots, latents = len(branches.calls[0]), self.probe.per_run["latents"]
        if latents.ndim == 5:
            grid = find_grid(self.probe, firsts, slots)
            self.found["latent_layout"] = grid.latents
            self.found["patch"] = Constant(grid.patch)
            if grid.given:
                self.found["given_frames"] = Constant(grid.given // grid.patch[0])
            self.verified += [
                f"Latents are {grid.latents}, and a token covers {_by(grid.patch)} of them.",
                "Tokens run frame by frame, row by row: every slice of every axis moves its own tokens and no others.",
            ]
            return grid
        return self._packed(firsts, slots, latents)

    def _packed(self, firsts: Sequence[tuple[nn.Module, Where]], slots: int, latents: torch.Tensor) -> Grid:
        names, shared = ("num_frames", "height", "width"), self.probe.shared
        told = [n for n in (self.first[0].kwargs.get(name) for name in names) if isinstance(n, int)]
        sizes = [n for n in (shared.get(name) for name in names) if isinstance(n, int)]
        if latents.ndim != 3 or len(told) + len(sizes) != 6:
            raise InferenceError(
                f"latents of shape {tuple(latents.shape)}: they have no axes of frames, height and width, and the "
                "denoiser and the call are not both told num_frames, height and width"
            )
        if not packed_in_order(self.probe, firsts, slots):
            raise InferenceError("token s of the packed latents is not token s of the blocks")
        frames, height, width = told
        compression = ((sizes[0] - 1) // max(1, frames - 1), sizes[1] // height)
        self.found |= {
            "latent_layout": "packed",
            "extent": PackedExtent("num_frames", compression),
            "patch": Constant((1, 1, 1)),
        }
        extent = self.found["extent"](self.probe.pipe, shared, latents)
        if extent != (frames, height, width):
            raise InferenceError(f"the denoiser is told {_by(told)} tokens, the size of the video gives {_by(extent)}")
        self.verified.append("Latents are packed, and each is one token of the blocks.")
        self.unverified.append(
            "That packed tokens run frame by frame, row by row is read off the denoiser's arguments num_frames, height "
            "and width, not seen."
        )
        return Grid("packed", (frames, height, width), (1, 1, 1), 0, tuple("rows" for _ in firsts))

    def _steps(self, shape: tuple[int, int, int]) -> None:
        set_steps, seen = find_steps(self.probe, shape)
        if set_steps is not None:
            self.found["set_steps"] = set_steps
        (self.unverified if isinstance(set_steps, StepsAsSeen) else self.verified).append(seen)

    def _blocks(self, branches: Branches, grid: Grid) -> None:
        declared: list[Blocks] = []
        heads: set[int] = set()
        prompt = self.first[0].kwargs[branches.conditioning[0]]
        for one, layout in zip(self.lists, grid.tokens, strict=True):
            if layout is None:
                self.unverified.append(f"{one.path} is left out: its tokens follow the latents in no known order.")
                continue
            found = [
                Dissection(module, given, video=one.video, texts=texts, prompt_tokens=prompt.shape[-2]).anatomy()
                for module, given, texts in zip(one.modules, one.inputs, one.texts, strict=True)
            ]
            heads |= {anatomy.heads for anatomy in found if anatomy.heads}
            declared += self._declared(one, layout, found)
        if not any("residual" in blocks.taps for blocks in declared):
            raise InferenceError("no list of blocks gives video tokens back in known places")
        if len(heads) > 1:
            raise InferenceError(f"attentions have {sorted(heads)} heads, but a family has one number")
        self.found |= {"blocks": tuple(declared), "heads": self._heads(heads.pop() if heads else 0)}
        # Blocks of lists that take turns are declared alike, one declaration a list.
        self.found["interleaved"] = self.interleaved and len(declared) > 1

    def _declared(self, one: BlockList, layout: TokenLayout, found: list[Anatomy]) -> Iterator[Blocks]:
        """Yield the declaration of a list: one, or several where its blocks are not alike."""
        count = count_of(one.path, len(one.modules), self.denoiser.config)  # type: ignore[arg-type]
        if isinstance(count, int):
            self.unverified.append(
                f"The number of blocks of {one.path} is written as {count}: no entry of the config is named like it."
            )
        if self.interleaved:
            found = [_common(found)] * len(found)
        start = 0
        for anatomy, group in groupby(found, key=lambda a: (a.taps, a.attention, a.text_input)):
            taps, attention, text = anatomy
            stop = start + len(list(group))
            at = f"{one.path}[{start}:{stop}]" if stop - start < len(found) else one.path
            doubts = dict.fromkeys(doubt for each in found[start:stop] for doubt in each.doubts)
            self.unverified += [f"{at}: {doubt}." for doubt in doubts]
            if layout == "frames" and "attn1" in attention:
                attention = {c: a for c, a in attention.items() if c != "attn1"}
                self.unverified.append(f"{at}: attn1 stays inside a frame, so it has no edges between frames to cut.")
            if "residual" in taps:
                seen = [key for key in taps if key not in found[start].guessed]
                edges = [f"{component} ({one.order})" for component, one in attention.items()]
                self.verified += [
                    f"{at}: {_count(stop - start, 'block')}, each called once and in order, tokens by {layout}.",
                    f"{at}: every token is in its place in {', '.join(seen)}.",
                    *([f"{at}: edges can be cut in {', '.join(edges)}."] if edges else []),
                ]
                yield Blocks(
                    path=one.path,
                    count=count,
                    at=slice(None) if stop - start == len(found) else slice(start, stop),
                    taps=taps,
                    attention=attention,
                    layout=layout,
                    video_input=one.video,
                    **({"text_input": text} if text else {}),
                )
            else:
                self.unverified.append(f"{at} is left out: what it gives back are not video tokens in known places.")
            start = stop

    def _heads(self, count: int) -> Any:
        config: Any = self.denoiser.config
        if config.get("num_attention_heads") == count:
            return default_of(Family, "heads")
        return Constant(count)

    def _returned(self, grid: Grid) -> None:
        """Find out the layout of what the pipeline returns."""
        stepped, final = self.loop.stepped, self.loop.final
        assert stepped is not None
        if not isinstance(final, torch.Tensor):
            raise InferenceError(f"with output_type='latent' the pipeline returned a {type(final).__name__}, no tensor")
        if final.shape == stepped.shape:
            return
        shapes = {n: tuple(final.shape[a] for a in axes[1:]) for n, axes in AXES.items() if final.ndim == 5}
        fits = [n for n, shape in shapes.items() if shape == grid.shape]
        if len(fits) != 1:
            raise InferenceError(
                f"the pipeline returned latents of shape {tuple(final.shape)}: {len(fits)} layouts fit it"
            )
        self.found["final_layout"] = fits[0]
        self.unverified.append(f"That the pipeline returns latents as {fits[0]} is read off their shape.")

    def _example(self) -> None:
        """Declare a run of the size of this one, if its arguments can be written down."""
        guidance = self.found["guidance"]
        shared = {k: v for k, v in self.probe.shared.items() if k != "num_inference_steps"}
        if not all(v is None or isinstance(v, (bool, int, float, str)) for v in shared.values()):
            self.unverified.append("example is not declared: an argument of the run cannot be written down.")
            return
        tensors = {
            name: (tuple(v.shape[1:]), str(v.dtype).removeprefix("torch.")) for name, v in self.probe.per_run.items()
        }
        off = dict.fromkeys(guidance.defaults, 1.0) if isinstance(guidance, Guidance) else {}
        self.found["example"] = Drawn(shared, tensors, off)


def _common(found: list[Anatomy]) -> Anatomy:
    """Return what all blocks of a list have."""
    first, rest = found[0], found[1:]
    return replace(
        first,
        taps={k: t for k, t in first.taps.items() if all(other.taps.get(k) == t for other in rest)},
        attention={k: a for k, a in first.attention.items() if all(other.attention.get(k) == a for other in rest)},
        doubts=tuple(dict.fromkeys(doubt for each in found for doubt in each.doubts)),
    )


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name).lower()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
