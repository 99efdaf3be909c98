"""Kinds that act inside the denoiser, by their definitions: activations, blocks, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from interventions.base import RunRef
from tests.reference.bare import Address, Moment, Plan
from tests.reference.world import World, branches, chosen, frames, window


def _sites(cell: Any, world: World) -> Iterable[Address]:
    for step in window(cell.step, cell.steps):
        for branch in branches(cell, world):
            for block in window(cell.layer, cell.layers):
                yield step, branch, block, cell.component, cell.stream, -1 if cell.head is None else cell.head


def _hidden(cell: Any, world: World, run: str, change: Callable[..., torch.Tensor], *sources: list[RunRef]) -> Plan:
    """Plan a change of the chosen tokens at every site of a cell, from the site's means over some runs each."""
    plan = Plan(run=run)
    meant = chosen(cell, world.extent).flatten() if cell.stream == "video" else slice(None)
    for address in _sites(cell, world):
        # Made now: a run under way cannot be left for another.
        donors = [world.mean(refs, address) for refs in sources]

        def new(h: torch.Tensor, _: Moment, at: Address = address, donors: Any = donors) -> torch.Tensor:
            result = h.clone()
            result[meant] = change(at, h, *donors)[meant]
            return result

        plan.sites[address].append(new)
    return plan


def _spread(value: torch.Tensor) -> torch.Tensor:
    return (value - value.mean(0)).square().mean(0).sqrt()


def patch(cell: Any, world: World) -> Plan:
    donor = RunRef("corrupted" if cell.direction == "noising" else "clean", sample=cell.donor_sample)

    def change(at: Address, h: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (1 - cell.alpha) * h + cell.alpha * other

    return _hidden(cell, world, "corrupted" if cell.direction == "denoising" else "clean", change, [donor])


def _reference(run: Any, samples: int) -> list[RunRef]:
    return [RunRef(run, sample=i, fixed=True) for i in range(samples)]


def ablate(cell: Any, world: World) -> Plan:
    def noise(at: Address, h: torch.Tensor) -> torch.Tensor:
        step, _, block, component, stream, head = at
        return h.mean(0) + _spread(h) * world.draw(h, f"ablate {component} {stream}", step, block, head)

    if cell.value == "zero":
        return _hidden(cell, world, cell.run, lambda at, h: 0 * h)
    if cell.value == "gaussian":
        return _hidden(cell, world, cell.run, noise)
    resample = [RunRef(cell.run, sample=cell.donor_sample)]
    refs = resample if cell.value == "resample" else _reference(cell.reference_run, cell.reference)
    return _hidden(cell, world, cell.run, lambda at, h, other: other, refs)


def hidden_noise(cell: Any, world: World) -> Plan:
    meant = chosen(cell, world.extent).flatten() if cell.stream == "video" else slice(None)

    def change(at: Address, h: torch.Tensor) -> torch.Tensor:
        step, _, block, component, stream, head = at
        eps = world.draw(h, f"hidden_noise {component} {stream}", step, block, head)
        return h + cell.strength * _spread(h[meant]) * eps

    return _hidden(cell, world, cell.run, change)


def steer(cell: Any, world: World) -> Plan:
    def change(at: Address, h: torch.Tensor, clean: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
        direction = clean - corrupted
        return h + cell.strength * (direction if cell.per_token else direction.mean(0))

    sources = (_reference(run, cell.reference) for run in ("clean", "corrupted"))
    return _hidden(cell, world, cell.run, change, *sources)


def seed_ensemble(cell: Any, world: World) -> Plan:
    refs = [RunRef(cell.run, seed=i) for i in range(cell.seeds)]
    return _hidden(cell, world, cell.run, lambda at, h, mean: mean, refs)


def block_skip(cell: Any, world: World) -> Plan:
    plan = Plan(run=cell.run)
    other = cell.layer + 1 if cell.other is None else cell.other
    for step in window(cell.step, cell.steps):
        for branch in branches(cell, world):
            if cell.mode == "swap":
                plan.programs |= {(step, branch, cell.layer): (other,), (step, branch, other): (cell.layer,)}
                continue
            for block in window(cell.layer, cell.layers):
                plan.programs[step, branch, block] = () if cell.mode == "skip" else (block, block)
    return plan


def _reads(cell: Any) -> Callable[[int, int], bool]:
    """Return whether a video token of one frame still reads a video token of another, from (query, key) frames."""
    named = {cell.frame} if cell.frame is not None else frames(cell.frames) if cell.frames else set()
    queries = frames(cell.queries) if cell.queries else set()
    return {
        "causal": lambda q, k: k <= q,
        "anti_causal": lambda q, k: k >= q,
        "local": lambda q, k: abs(q - k) <= cell.reach,
        "from_frames": lambda q, k: k not in named or q == k,
        "to_frames": lambda q, k: q not in named or q == k,
        "between": lambda q, k: not (q in queries and k in named),
        "text": lambda q, k: True,
    }[cell.pattern]


def knockout(cell: Any, world: World) -> Plan:
    plan, extent, reads = Plan(run=cell.run), world.extent, _reads(cell)
    joint = any(order in ("video_text", "text_video") for b in world.layout.blocks for _, order in b.attention.values())
    component = cell.component or ("attn2" if cell.pattern == "text" and not joint else "attn1")

    def keep(block: int) -> Callable[[int, int, int], torch.Tensor]:
        blocks = extent.blocks[block][0]
        order, places = blocks.attention[component][1], extent.height * extent.width
        per_frame = 1 if blocks.fold == "places" else places
        frame = [t // per_frame for t in range(extent.frames * per_frame)]

        def mask(head: int, queries: int, keys: int) -> torch.Tensor:
            allowed = torch.ones(queries, keys, dtype=torch.bool)
            if cell.head not in (None, head):
                return allowed
            if order == "cross":
                return allowed & (cell.pattern != "text")
            first = keys - len(frame) if order == "text_video" else 0
            video = slice(first, first + len(frame))
            if cell.pattern == "text":
                allowed[video] = False
            allowed[video, video] = torch.tensor([[reads(q, k) for k in frame] for q in frame])
            return allowed

        return mask

    for step in window(cell.step, cell.steps):
        for branch in branches(cell, world):
            for block in window(cell.layer, cell.layers):
                plan.cuts[step, branch, block, component].append(keep(block))
    return plan
