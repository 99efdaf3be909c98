"""Every kind of intervention by its definition: from its fields to the changes that a bare run makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from interventions.base import KINDS, RowContext, RunRef
from tests.reference import recipes_hidden as hidden
from tests.reference.bare import Extent, Moment, Plan
from tests.reference.clock import Edit
from tests.reference.world import World, branches, chosen, window

OTHER = {"clean": "corrupted", "corrupted": "clean"}


def result(cell: Any, world: World) -> torch.Tensor:
    """Return the final latents of a cell, (C, F, H, W)."""
    return world.result(RECIPES[cell.kind](cell, world))


def _on_latents(value: torch.Tensor, new: torch.Tensor, cell: Any, extent: Extent) -> torch.Tensor:
    """Return latents with the chosen ones replaced, (C, F, H, W)."""
    meant = chosen(cell, extent)
    result = value.clone()
    pt, ph, pw = (n // m for n, m in zip(value.shape[1:], meant.shape, strict=True))
    for f, y, x in meant.nonzero().tolist():
        at = (slice(None), slice(f * pt, f * pt + pt), slice(y * ph, y * ph + ph), slice(x * pw, x * pw + pw))
        result[at] = new[at]
    return result


def _prompt_swap(cell: Any, world: World) -> Plan:
    plan = Plan(run=cell.run)
    donor = RunRef(OTHER[cell.run]) if cell.donor == "pair" else RunRef(cell.run, sample=cell.offset or 1)  # type: ignore[arg-type]
    last = world.extent.steps if cell.steps is None else cell.step + cell.steps
    for step in range(cell.step, last):
        for branch in branches(cell, world):
            plan.prompts[step, branch].append(world.trace(donor).prompts[branch])
    return plan


def _latent_swap(cell: Any, world: World) -> Plan:
    plan, offset = Plan(run=cell.run), cell.offset or 1
    donor = {
        "pair": RunRef(OTHER[cell.run]),  # type: ignore[arg-type]
        "seed": RunRef(cell.run, seed=offset),
        "sample": RunRef(cell.run, sample=offset),
    }[cell.donor]
    for step in window(cell.step, cell.steps):
        there = world.trace(donor).latents[step]
        plan.latents[step].append(
            lambda x, _, there=there: _on_latents(x, (1 - cell.alpha) * x + cell.alpha * there, cell, world.extent)
        )
    return plan


def _latent_noise(cell: Any, world: World) -> Plan:
    plan = Plan(run=cell.run)

    def at(step: int) -> Callable[[torch.Tensor, Moment], torch.Tensor]:
        def new(x: torch.Tensor, moment: Moment) -> torch.Tensor:
            eps, (alpha, sigma) = world.draw(x, "latent_noise", step), moment.levels[step]
            if cell.form == "additive":
                return _on_latents(x, x + cell.strength * eps, cell, world.extent)
            signal = 0.0 if moment.x0_hat is None else alpha * moment.x0_hat
            return _on_latents(x, signal + sigma * eps, cell, world.extent)

        return new

    for step in window(cell.step, cell.steps):
        plan.latents[step].append(at(step))
    return plan


def _noise(cell: Any, world: World) -> Plan:
    plan, recorded = Plan(run=cell.run), world.trace(RunRef(cell.run)).x0_hat

    def at(step: int) -> Callable[[torch.Tensor, Moment], torch.Tensor]:
        def new(x: torch.Tensor, moment: Moment) -> torch.Tensor:
            eps, (alpha, sigma) = world.draw(x, f"noise at {cell.at}", step), moment.levels[step]
            estimate = moment.x0_hat if cell.at == "frame" else recorded[step]
            signal = 0.0 if estimate is None else alpha * estimate
            noised = eps if cell.path == "off_path" else signal + sigma * eps
            if cell.at == "step":
                return noised
            result, each = x.clone(), x.shape[1] // world.extent.frames
            result[:, cell.frame * each : (cell.frame + 1) * each] = noised[
                :, cell.frame * each : (cell.frame + 1) * each
            ]
            return result

        return new

    for step in [cell.step] if cell.at == "step" else range(world.extent.steps):
        plan.latents[step].append(at(step))
    return plan


def _frame_order(cell: Any, world: World) -> list[int]:
    extent = world.extent
    moved = list(range(extent.given, extent.frames))
    if cell.mode == "reverse":
        shown = moved[::-1]
    elif cell.mode == "freeze":
        shown = [min(f, cell.frame) for f in moved]
    elif cell.mode == "drop":
        neighbour = cell.frame - 1 if cell.frame > extent.given else cell.frame + 1
        shown = [neighbour if f == cell.frame else f for f in moved]
    else:
        context = RowContext(geometry=None, levels=(), seed=world.seed)  # type: ignore[arg-type]
        generator = context.generator("frame_shuffle", cell.step, -1 if cell.layer is None else cell.layer)
        shown = moved.copy()
        for i in reversed(range(1, len(shown))):
            j = int(generator.integers(i))
            shown[i], shown[j] = shown[j], shown[i]
    return [*range(extent.given), *shown]


def _frame_shuffle(cell: Any, world: World) -> Plan:
    plan, order, extent = Plan(run=cell.run), _frame_order(cell, world), world.extent

    def latents(x: torch.Tensor, moment: Moment) -> torch.Tensor:
        pieces = x.chunk(extent.frames, dim=1)
        return torch.cat([pieces[f] for f in order], dim=1)

    def tokens(h: torch.Tensor, moment: Moment) -> torch.Tensor:
        pieces = h.chunk(extent.frames)
        return torch.cat([pieces[f] for f in order])

    for step in window(cell.step, cell.steps):
        if cell.space == "latents":
            plan.latents[step].append(latents)
            continue
        for branch in branches(cell, world):
            for block in window(cell.layer, cell.layers):
                plan.sites[step, branch, block, cell.component, "video", -1].append(tokens)
    return plan


def _known(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None
    return value


def _step_skip(cell: Any, world: World) -> Plan:
    plan = Plan(run=cell.run)
    if cell.mode == "reuse":
        plan.predictions[cell.step].append(lambda v, moment: _known(moment.prediction))
    elif cell.mode == "reuse_branch":
        plan.outputs[cell.step, cell.branch].append(lambda v, moment: moment.outputs[cell.branch])
    elif cell.mode == "freeze":
        plan.latents[cell.step + 1].append(lambda x, moment: _known(moment.entering))
    else:
        plan.edit = Edit(cell.mode, cell.step, cell.step + 1 if cell.other is None else cell.other)
    return plan


def _compose(cell: Any, world: World) -> Plan:
    """Join the plans of the parts, in the order of their names."""
    plans = []
    for _, pairs in sorted(cell.parts):
        fields = dict(pairs)
        cls = KINDS[fields["kind"]]
        for index in ("step", "layer", "frame", "head"):
            known = cls.model_fields.get(index)
            if fields.get(index) == "shared" or (known and known.is_required() and index not in fields):
                fields[index] = getattr(cell, index)
        plans.append(RECIPES[fields["kind"]](cls(**fields), world))
    whole = plans[0]
    for plan in plans[1:]:
        for name in ("latents", "predictions", "outputs", "prompts", "sites", "cuts"):
            for at, changes in getattr(plan, name).items():
                getattr(whole, name)[at].extend(changes)
        whole.programs |= plan.programs
        whole.edit = whole.edit or plan.edit
    return whole


RECIPES: dict[str, Callable[[Any, World], Plan]] = {
    "ablate": hidden.ablate,
    "block_skip": hidden.block_skip,
    "compose": _compose,
    "frame_shuffle": _frame_shuffle,
    "hidden_noise": hidden.hidden_noise,
    "knockout": hidden.knockout,
    "latent_noise": _latent_noise,
    "latent_swap": _latent_swap,
    "noise": _noise,
    "patch": hidden.patch,
    "prompt_swap": _prompt_swap,
    "seed_ensemble": hidden.seed_ensemble,
    "steer": hidden.steer,
    "step_skip": _step_skip,
}
