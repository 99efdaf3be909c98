"""An independent implementation of every intervention: an explicit Euler loop and plain PyTorch forward hooks.

For Wan image-to-video with the first latent frame given, the form of the embedded model.

One row, whole run, no nnsight, no replay, no batching, no code of the engine. Only the definition of a random draw
(which seed belongs to which coordinates) is shared, because it is part of an intervention's meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from interventions.base import Intervention, RowContext
from interventions.record import RunInputs
from interventions.sites import Geometry

Hook = Callable[[int, str, torch.Tensor], torch.Tensor | None]


@dataclass
class Loop:
    """A Wan image-to-video run with the first latent frame given, written out."""

    pipe: Any
    inputs: RunInputs
    geometry: Geometry
    hooks: dict[tuple[int, str], Callable[..., torch.Tensor | None]] = field(default_factory=dict)

    def sigmas(self) -> list[float]:
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(self.geometry.steps)
        return [float(s) for s in scheduler.sigmas]

    def given_frame(self) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(self.inputs.shared["image"])).permute(2, 0, 1)[None, :, None] / 127.5 - 1
        config = self.pipe.vae.config
        mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
        return (self.pipe.vae.encode(pixels.float()).latents - mean) / std

    def velocity(self, row: int, x: torch.Tensor, sigma: float, step: int) -> torch.Tensor:
        g = self.geometry
        seen = x.clone()
        seen[:, :, :1] = self.given_frame()
        timestep = torch.full((1, g.frames, g.tokens_per_frame), 1000 * sigma)
        timestep[:, 0] = 0
        guided = []
        for branch in g.branches:
            name = "prompt_embeds" if branch == "cond" else "negative_prompt_embeds"
            with self.hooked(step, branch):
                guided.append(
                    self.pipe.transformer(
                        hidden_states=seen,
                        timestep=timestep.flatten(1),
                        encoder_hidden_states=self.inputs.per_run[name][row : row + 1],
                        return_dict=False,
                    )[0]
                )
        if len(guided) == 1:
            return guided[0]
        return guided[1] + self.inputs.shared["guidance_scale"] * (guided[0] - guided[1])

    @contextmanager
    def hooked(self, step: int, branch: str) -> Iterator[None]:
        hook = self.hooks.get((step, branch))
        handles = [] if hook is None else hook(self.pipe.transformer)
        yield
        for handle in handles:
            handle.remove()

    @torch.no_grad()
    def run(
        self,
        row: int,
        schedule: list[tuple[int, float, float]] | None = None,
        edit_latents: Callable[[int, torch.Tensor, torch.Tensor | None], torch.Tensor] | None = None,
        edit_velocity: Callable[[int, torch.Tensor, torch.Tensor | None], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return final latents and the clean estimates; ``schedule`` lists (step, sigma from, sigma to)."""
        s = self.sigmas()
        schedule = schedule or [(i, s[i], s[i + 1]) for i in range(self.geometry.steps)]
        x = self.inputs.per_run["latents"][row : row + 1].clone()
        estimates: list[torch.Tensor] = []
        velocity = None
        for step, here, there in schedule:
            if edit_latents is not None:
                x = edit_latents(step, x, estimates[-1] if estimates else None)
            new = self.velocity(row, x, here, step)
            if edit_velocity is not None:
                new = edit_velocity(step, new, velocity)
            velocity = new
            estimates.append(x - here * velocity)
            x = x + (there - here) * velocity
        if edit_latents is not None:
            x = edit_latents(self.geometry.steps, x, estimates[-1])
        x[:, :, :1] = self.given_frame()
        return x, estimates


def recompute(pipe: Any, inputs: RunInputs, geometry: Geometry, cell: Intervention) -> torch.Tensor:
    """Return the final latents (1, C, F, H, W) of one cell."""
    row = inputs.names.index(cell.recipient)
    context = RowContext(geometry=geometry, levels=(), seed=inputs.seed)
    return RECIPES[cell.kind](Loop(pipe, inputs, geometry), row, cell, context)


def _module(transformer: Any, layer: int, component: str) -> Any:
    block = transformer.blocks[layer]
    return block if component in ("update", "residual") else getattr(block, component)


def _patch(loop: Loop, row: int, cell: Any, context: RowContext) -> torch.Tensor:
    branches = loop.geometry.branches if cell.branch == "both" else (cell.branch,)
    donors: dict[str, torch.Tensor] = {}

    def reader(branch: str) -> Callable[[Any], list[Any]]:
        def read(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            donors[branch] = output - _entering(args, kwargs) if cell.component == "update" else output

        return lambda t: [_module(t, cell.layer, cell.component).register_forward_hook(read, with_kwargs=True)]

    def writer(branch: str) -> Callable[[Any], list[Any]]:
        def write(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
            base = _entering(args, kwargs) if cell.component == "update" else torch.zeros_like(output)
            mixed = base + (1 - cell.alpha) * (output - base) + cell.alpha * donors[branch]
            if cell.frame is None:
                return mixed
            n = loop.geometry.tokens_per_frame
            result = output.clone()
            result[:, cell.frame * n : (cell.frame + 1) * n] = mixed[:, cell.frame * n : (cell.frame + 1) * n]
            return result

        return lambda t: [_module(t, cell.layer, cell.component).register_forward_hook(write, with_kwargs=True)]

    loop.hooks = {(cell.step, b): reader(b) for b in branches}
    loop.run(loop.inputs.names.index(cell.donor))
    loop.hooks = {(cell.step, b): writer(b) for b in branches}
    return loop.run(row)[0]


def _entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _step_skip(loop: Loop, row: int, cell: Any, context: RowContext) -> torch.Tensor:
    s, k = loop.sigmas(), cell.step
    steps = [(i, s[i], s[i + 1]) for i in range(loop.geometry.steps)]
    if cell.mode == "reuse":
        return loop.run(row, edit_velocity=lambda step, new, before: before if step == k else new)[0]
    if cell.mode == "freeze":
        steps[k] = (k, s[k], s[k])
    elif cell.mode == "repeat":
        steps.insert(k, steps[k])
    else:
        kept = [i for i in range(len(s)) if i != k]
        steps = [(i, s[i], s[j]) for i, j in pairwise(kept)]
    return loop.run(row, schedule=steps)[0]


def _frame_shuffle(loop: Loop, row: int, cell: Any, context: RowContext) -> torch.Tensor:
    order = torch.tensor(_frame_order(cell, context))
    if cell.space == "latents":
        return loop.run(row, edit_latents=lambda step, x, _: x[:, :, order] if step == cell.step else x)[0]

    def write(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        frames = output.reshape(1, loop.geometry.frames, loop.geometry.tokens_per_frame, -1)
        return frames[:, order].reshape(output.shape)

    hook = lambda t: [t.blocks[cell.layer].register_forward_hook(write)]  # noqa: E731
    loop.hooks = {(cell.step, b): hook for b in loop.geometry.branches}
    return loop.run(row)[0]


def _frame_order(cell: Any, context: RowContext) -> list[int]:
    moved = list(range(context.geometry.given_frames, context.geometry.frames))
    if cell.mode == "reverse":
        moved = moved[::-1]
    elif cell.mode == "freeze":
        moved = [f if f < cell.frame else cell.frame for f in moved]
    else:
        generator = context.generator("frame_shuffle", cell.step, -1 if cell.layer is None else cell.layer)
        for i in reversed(range(1, len(moved))):
            j = int(generator.integers(i))
            moved[i], moved[j] = moved[j], moved[i]
    return list(range(context.geometry.given_frames)) + moved


def _noise(loop: Loop, row: int, cell: Any, context: RowContext) -> torch.Tensor:
    s = loop.sigmas()
    clean = loop.run(row)[1]

    def edit(step: int, x: torch.Tensor, estimate: torch.Tensor | None) -> torch.Tensor:
        if step >= loop.geometry.steps or (cell.at == "step" and step != cell.step):
            return x
        purpose = f"noise at {cell.at}"
        eps = torch.from_numpy(context.generator(purpose, step).standard_normal(x.shape[1:], dtype=np.float32))[None]
        base = clean[step] if cell.at == "step" else estimate
        renoised = eps if cell.path == "off_path" or base is None else (1 - s[step]) * base + s[step] * eps
        if cell.at == "step":
            return renoised
        result = x.clone()
        result[:, :, cell.frame] = renoised[:, :, cell.frame]
        return result

    return loop.run(row, edit_latents=edit)[0]


RECIPES: dict[str, Callable[[Loop, int, Any, RowContext], torch.Tensor]] = {
    "patch": _patch,
    "step_skip": _step_skip,
    "frame_shuffle": _frame_shuffle,
    "noise": _noise,
}
