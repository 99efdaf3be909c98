"""Lists of transformer blocks of a denoiser: modules called once each in order, which take and give video tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from interventions.families.facts import is_prompt
from interventions.probing.forward import Where
from interventions.probing.run import InferenceError, Probe, named, noise_like

Given = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(slots=True)
class BlockList:
    """A list of blocks.

    Attributes
    ----------
    path : inside the denoiser. modules : its blocks. inputs : their arguments at the first denoiser call.
    video : the argument with the video tokens. texts : arguments that may carry text tokens, block by block.
    """

    path: str
    modules: list[nn.Module]
    inputs: list[Given]
    video: Where
    texts: list[list[Where]]


_COMMON_WORDS = {"transformer", "block", "blocks", "layer", "layers", "num", "n", "depth"}


def find_block_lists(probe: Probe, denoiser: nn.Module, doubts: list[str]) -> tuple[list[BlockList], bool]:
    """Return the outermost lists of video blocks in forward order, and whether they take turns block by block.

    Raises
    ------
    InferenceError : there is none, or their blocks run in an order that cannot be declared.
    """
    lists = {p: [*m.children()] for p, m in denoiser.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    ran = _order(probe, denoiser, [module for modules in lists.values() for module in modules])
    # A list inside a module of another list is part of a block, such as the layers of a feed-forward.
    outer = {p: ms for p, ms in lists.items() if not any(p.startswith(f"{q}.") for q in lists)}
    once = {p: ms for p, ms in outer.items() if [r for r in ran if any(r is m for m in ms)] == ms}
    found = [one for path, modules in once.items() if (one := _video_list(probe, path, modules, doubts))]
    if not found:
        raise InferenceError(
            f"no list of blocks: none of the module lists {', '.join(outer) or '(none)'} has modules that are called "
            "once each, in order, with one tensor of video tokens that they give back in its shape"
        )
    found.sort(key=lambda one: ran.index(one.modules[0]))
    order = [r for r in ran if any(r is m for one in found for m in one.modules)]
    if order == [m for one in found for m in one.modules]:
        return found, False
    if len({len(one.modules) for one in found}) == 1 and order == [
        m for turn in zip(*(one.modules for one in found), strict=True) for m in turn
    ]:
        return found, True
    raise InferenceError(
        f"blocks of {', '.join(one.path for one in found)} run neither list by list nor turn by turn. Write the "
        "adapter by hand, with a list for each stretch."
    )


def count_of(path: str, length: int, config: Mapping[str, Any]) -> str | int:
    """Return the key of a list's length in the denoiser's config, or the length if no key is named like the list."""
    keys = {k: _words(k) for k, v in config.items() if v == length and type(v) is int and _counts(k)}
    for words in (_words(path), set()):
        if fitting := [k for k, found in keys.items() if found == words]:
            return fitting[0] if len(fitting) == 1 else length
    return length


def _counts(key: str) -> bool:
    return bool(re.search(r"layers?$|blocks?$|depth$", key))


def _words(name: str) -> set[str]:
    """Return what tells a list or its length apart: "single" of single_transformer_blocks and num_single_layers."""
    return set(re.split(r"[._]", name.lower())) - _COMMON_WORDS


def _order(probe: Probe, denoiser: nn.Module, modules: list[nn.Module]) -> list[nn.Module]:
    """Return modules in the order of their calls during the first denoiser call."""
    ran: list[nn.Module] = []
    calls = 0

    def begins(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1

    def runs(module: nn.Module, args: Any) -> None:
        if calls == 1:
            ran.append(module)

    hooks = [denoiser.register_forward_pre_hook(begins), *(m.register_forward_pre_hook(runs) for m in modules)]
    try:
        probe.loop(first_step_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def _video_list(probe: Probe, path: str, modules: list[nn.Module], doubts: list[str]) -> BlockList | None:
    # Without exchange between tokens, what follows the latents is video, and what follows the prompt is text.
    latents = probe.per_run["latents"]
    prompts = {n: v + noise_like(v) for n, v in probe.per_run.items() if is_prompt(n) and v.is_floating_point()}
    before = probe.entering(modules, local=True)
    moved = probe.entering(modules, {"latents": latents + noise_like(latents)}, local=True)
    asked = probe.entering(modules, prompts, local=True)
    following = [_following(*each) for each in zip(modules, before, moved, strict=True)]
    given_back = _shapes_given(probe, modules)
    candidates = [
        where
        for where, shape in following[0].items()
        if len(shape) == 3 and all(f.get(where) == shape in back for f, back in zip(following, given_back, strict=True))
    ]
    follow_prompt = [_following(*each) for each in zip(modules, before, asked, strict=True)]
    if len(candidates) != 1:
        if candidates:
            doubts.append(f"{path} is left out: {', '.join(n for _, n in candidates)} could all be its video tokens.")
        elif any(len(shape) == 3 for shape in follow_prompt[0].values()):
            doubts.append(f"{path} is left out: text passes through it, but no video tokens.")
        return None
    (video,) = candidates
    batch = following[0][video][0]
    texts = [[w for w, s in f.items() if len(s) == 3 and s[0] == batch and w != video] for f in follow_prompt]
    return BlockList(path, modules, probe.entering(modules), video, texts)


def _following(module: nn.Module, a: Given, b: Given) -> dict[Where, torch.Size]:
    """Return the arguments that differ between two calls of a module, with their shapes."""
    before, after = named(module, *a), named(module, *b)
    return {
        where: value.shape
        for where, value in before.items()
        if isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.shape == after[where].shape
        and not torch.equal(value, after[where])
    }


def _shapes_given(probe: Probe, modules: list[nn.Module]) -> list[list[torch.Size]]:
    """Return the shapes of the tensors that each module gives at its first call."""
    found: dict[int, list[torch.Size]] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        parts = output if isinstance(output, (tuple, list)) else (output,)
        found.setdefault(id(module), [p.shape for p in parts if isinstance(p, torch.Tensor)])

    hooks = [m.register_forward_hook(note) for m in modules]
    try:
        probe.loop(first_step_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[id(m)] for m in modules]
