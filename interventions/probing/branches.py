"""Which denoiser call, and which rows of it, compute which guidance branch, by what follows when a prompt is moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from interventions.families.facts import Guidance, GuidanceAsSeen, is_negative, is_prompt
from interventions.families.family import Calls
from interventions.probing.run import Call, InferenceError, Probe, noise_like
from interventions.sites import Branch

ROW = 1
"""The run whose prompt is moved."""


@dataclass(frozen=True, slots=True)
class Branches:
    """Denoiser calls of a step.

    Attributes
    ----------
    calls : each with its guidance branches. conditioning : keywords of the denoiser that follow the prompts, one row a
        run, embeddings first. video : argument that follows the latents. doubts : what could not be decided.
    """

    calls: Calls
    conditioning: tuple[str, ...]
    video: str
    doubts: tuple[str, ...]


def find_branches(probe: Probe, calls: list[Call]) -> Branches:
    """Return the branches of the first step's denoiser calls.

    Raises
    ------
    InferenceError : a call's rows are not those of the runs, or its branches cannot be told apart.
    """
    moves = {
        name: _first_step(probe, calls[0].denoiser, changed={name: changed})
        for name, value in probe.per_run.items()
        if (changed := _changed(value)) is not None
    }
    follow = {name: [_rows(a, b) for a, b in zip(calls, after, strict=True)] for name, after in moves.items()}
    sizes = [_batch(call, follow["latents"][k]) for k, call in enumerate(calls)]
    slots = [(k, slot) for k, size in enumerate(sizes) for slot in range(size // 2)]
    if any(size % 2 for size in sizes):
        raise InferenceError(f"denoiser calls of {sizes} rows for 2 runs: rows of a call must be whole branches")
    doubts = _other_inputs(follow)
    prompts = {name: rows for name, rows in follow.items() if is_prompt(name)}
    branch = {slot: _branch(slot, prompts) for slot in slots}
    found = list(branch.values())
    if sorted(found) not in (["cond"], ["cond", "uncond"]):
        raise InferenceError(
            f"the denoiser calls of a step compute the branches {', '.join(found)}: only one conditional and at most "
            "one unconditional branch can be addressed. Switch other guidance off, and call what belongs to the "
            "unconditional branch negative_ something."
        )
    conditioning, more = _conditioning(prompts, calls)
    return Branches(
        calls=tuple(tuple(branch[slot] for slot in slots if slot[0] == k) for k in range(len(calls))),
        conditioning=conditioning,
        video=next(name for name, rows in follow["latents"][0].items() if rows),
        doubts=(*doubts, *more),
    )


def find_guidance(probe: Probe, denoiser: str, found: Branches) -> tuple[Guidance | GuidanceAsSeen, dict[bool, Calls]]:
    """Return what tells whether guidance is on, and the calls with guidance and without.

    Every argument named after a guidance scale is set to 1, alone and then all together, until a branch disappears.
    """
    scales = {
        name: float(p.default) if isinstance(p.default, (int, float)) else 0.0
        for name, p in probe.signature.items()
        if name.endswith(("guidance_scale", "cfg_scale"))
    }
    seen = found.calls
    guided = sum(map(len, seen)) > 1

    def rows(scale: float, names: tuple[str, ...]) -> list[int]:
        calls = _first_step(probe, denoiser, shared=dict.fromkeys(names, scale))
        return [len(_tensors(call)[found.video]) for call in calls]

    if guided:
        for names in [*((name,) for name in scales), tuple(scales)]:
            if names and rows(1.0, names) == [2] and rows(1.01, names) == [2 * len(call) for call in seen]:
                return Guidance({name: scales[name] for name in names}), {True: seen, False: (("cond",),)}
    arguments = {name: probe.shared.get(name, scales[name]) for name in scales}
    return GuidanceAsSeen(guided, arguments), {guided: seen}


def _first_step(probe: Probe, denoiser: str, **changes: Any) -> list[Call]:
    """Return a denoiser's calls of the first step, without those of modules that run once before."""
    return [call for call in probe.loop(first_step_only=True, **changes).of_step(0) if call.denoiser == denoiser]


def _changed(value: torch.Tensor) -> torch.Tensor | None:
    """Move one row of a tensor: noise on numbers, the last entry of a mask taken away."""
    changed = value.clone()
    if value.is_floating_point() and not _is_mask(value):
        changed[ROW] += noise_like(changed[ROW])
        return changed
    flat = changed[ROW].reshape(-1)
    kept = flat.nonzero().flatten()
    if len(kept) < 2:
        return None
    flat[kept[-1]] = 0
    return changed


def _is_mask(value: torch.Tensor) -> bool:
    return bool(((value == 0) | (value == 1)).all())


def _tensors(call: Call) -> dict[str, torch.Tensor]:
    given: dict[str, Any] = {**{f"argument {i}": v for i, v in enumerate(call.args)}, **call.kwargs}
    return {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.ndim}


def _rows(before: Call, after: Call) -> dict[str, list[int] | None]:
    """Return which rows of each argument differ; None where its shape does."""
    found: dict[str, list[int] | None] = {}
    others = _tensors(after)
    for name, value in _tensors(before).items():
        other = others.get(name)
        if other is None or other.shape != value.shape:
            found[name] = None
        elif rows := (value != other).reshape(len(value), -1).any(1).nonzero().flatten().tolist():
            found[name] = rows
    return found


def _batch(call: Call, follow: Mapping[str, list[int] | None]) -> int:
    tensors = _tensors(call)
    sizes = {len(tensors[name]) for name, rows in follow.items() if rows}
    if len(sizes) != 1:
        raise InferenceError(f"arguments of {call.denoiser} that follow the latents have {sorted(sizes)} rows")
    return sizes.pop()


def _branch(slot: tuple[int, int], prompts: Mapping[str, list[dict[str, list[int] | None]]]) -> Branch:
    call, place = slot
    moving = {
        is_negative(name)
        for name, calls in prompts.items()
        if any(rows and any(row // 2 == place for row in rows) for rows in calls[call].values())
    }
    if len(moving) > 1:
        raise InferenceError("a row of the denoiser follows both the prompt and the negative prompt")
    # Some pipelines make an empty prompt themselves, which follows nothing that is given.
    return "cond" if moving == {False} else "uncond"


def _other_inputs(follow: Mapping[str, list[dict[str, list[int] | None]]]) -> list[str]:
    return [
        f"The per-run tensor {name} enters the denoiser too, as {', '.join(sorted(calls[0]))}; it is neither a prompt "
        "nor the latents that are addressed."
        for name, calls in follow.items()
        if not is_prompt(name) and name != "latents" and calls[0]
    ]


def _conditioning(
    prompts: Mapping[str, list[dict[str, list[int] | None]]], calls: list[Call]
) -> tuple[tuple[str, ...], list[str]]:
    doubts, whole = [], {}
    names = dict.fromkeys(arg for each in prompts.values() for call in each for arg in call)
    for name in names:
        followed = [(k, call[name]) for each in prompts.values() for k, call in enumerate(each) if name in call]
        if name.startswith("argument "):
            doubts.append(f"The denoiser is given the prompt as {name}, not by name, so prompts cannot be exchanged.")
        elif any(rows is None or {row % 2 for row in rows} != {ROW} for _, rows in followed):
            doubts.append(f"The denoiser's {name} follows the prompts, but not row by row; it is not conditioning.")
        else:
            whole[name] = _tensors(calls[followed[0][0]])[name]
    return tuple(sorted(whole, key=lambda name: (-(whole[name].ndim > 2), -whole[name].is_floating_point()))), doubts
