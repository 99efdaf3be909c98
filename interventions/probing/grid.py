"""Which latents a token is made of: every slice of every axis of the latents moved, and the tokens that follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from interventions.families.family import LatentLayout, TokenLayout
from interventions.probing.forward import Where
from interventions.probing.run import InferenceError, Probe, named, noise_like

AXES: dict[LatentLayout, tuple[int, int, int, int]] = {
    "CFHW": (1, 2, 3, 4),
    "FCHW": (2, 1, 3, 4),
    "FHWC": (4, 1, 2, 3),
}
"""Axes of channels, frames, height and width in batched latents."""
LAYOUTS: tuple[TokenLayout, ...] = ("rows", "frames", "places")
MOVED_ROW = 1
"""The run whose latents are moved; the other must stay as it is."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Axes of the latents, and how tokens cover them.

    Attributes
    ----------
    latents : layout of the latents. shape : their (frames, height, width). patch : what one token covers of it.
    given : latent frames that reach no token. tokens : layout of the tokens of each block list, None if none fits.
    """

    latents: LatentLayout
    shape: tuple[int, int, int]
    patch: tuple[int, int, int]
    given: int
    tokens: tuple[TokenLayout | None, ...]


def find_grid(probe: Probe, blocks: Sequence[tuple[nn.Module, Where]], slots: int) -> Grid:
    """Return the grid of 5-D latents, proven for every slice of every axis.

    Parameters
    ----------
    blocks : the first block of every list, and its argument with the video tokens.
    slots : guidance branches in the denoiser call, each with the rows of all runs.

    Raises
    ------
    InferenceError : no known layout explains which tokens follow which latents.
    """
    latents = probe.per_run["latents"]
    before, rows = _video(probe, blocks, latents), slots * len(latents)

    def follow(axis: int, index: int) -> list[torch.Tensor]:
        after = _video(probe, blocks, _slice(latents, axis, index))
        return [_moved(a, b) for a, b in zip(before, after, strict=True)]

    moves = [(axis, i, follow(axis, i)) for axis in range(1, 5) for i in range(latents.shape[axis])]
    fits = []
    for name, axes in AXES.items():
        shape = latents.shape[axes[1]], latents.shape[axes[2]], latents.shape[axes[3]]
        for layout in LAYOUTS:
            patterns = [(a, i, _tokens(m[0], layout, rows, shape)) for a, i, m in moves]
            if found := _fit(patterns, axes, shape):
                fits.append((name, shape, *found))
    if len(fits) != 1:
        sizes = tuple(latents.shape[1:])
        raise InferenceError(
            f"latents of shape {sizes}: {len(fits)} layouts of {', '.join(AXES)} explain which tokens follow which "
            "latents. Give at least 2 frames of 2 x 3 tokens; latents that mix before the first block have no adapter."
        )
    name, shape, patch, given = fits[0]
    tokens = []
    for k in range(len(blocks)):
        patterns_of = {t: [(a, i, _tokens(m[k], t, rows, shape)) for a, i, m in moves] for t in LAYOUTS}
        same = (t for t in LAYOUTS if _fit(patterns_of[t], AXES[name], shape) == (patch, given))
        tokens.append(next(same, None))
    return Grid(latents=name, shape=shape, patch=patch, given=given, tokens=tuple(tokens))


def packed_in_order(probe: Probe, blocks: Sequence[tuple[nn.Module, Where]], slots: int) -> bool:
    """Tell whether token s of packed latents is token s of the blocks of every list, for every token."""
    latents = probe.per_run["latents"]
    before, rows = _video(probe, blocks, latents), slots * len(latents)
    for token in range(latents.shape[1]):
        after = _video(probe, blocks, _slice(latents, 1, token))
        for a, b in zip(before, after, strict=True):
            mask = _moved(a, b)
            tokens = _row(mask) if len(mask) == rows else None
            if tokens is None or tokens.nonzero().flatten().tolist() != [token]:
                return False
    return True


def _slice(latents: torch.Tensor, axis: int, index: int) -> torch.Tensor:
    changed = latents.clone()
    part = changed[MOVED_ROW].select(axis - 1, index)
    part += noise_like(part)
    return changed


def _video(probe: Probe, blocks: Sequence[tuple[nn.Module, Where]], latents: torch.Tensor) -> list[torch.Tensor]:
    inputs = probe.entering([block for block, _ in blocks], {"latents": latents}, local=True)
    return [named(block, *given)[where] for (block, where), given in zip(blocks, inputs, strict=True)]


def _moved(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a != b).any(-1)


def _row(mask: torch.Tensor) -> torch.Tensor | None:
    """Return what moves in the moved run of a (rows, tokens) mask, the same in every branch; None if others move."""
    branches = mask.unflatten(0, (-1, 2))
    if branches[:, 1 - MOVED_ROW].any() or (branches != branches[:1]).any():
        return None
    return branches[0, MOVED_ROW]


def _tokens(mask: torch.Tensor, layout: TokenLayout, rows: int, shape: tuple[int, int, int]) -> torch.Tensor | None:
    """Return which tokens of the moved run follow, frame by frame; None if the layout does not fit."""
    batch = len(mask)
    if batch % rows or (layout == "rows") != (batch == rows):
        return None
    folded = mask.unflatten(0, (rows, -1))
    if layout == "places":
        folded = folded.transpose(1, 2)
    if layout != "rows" and shape[0] % folded.shape[1]:
        return None
    return _row(folded.flatten(1))


def _fit(
    patterns: list[tuple[int, int, torch.Tensor | None]],
    axes: tuple[int, int, int, int],
    shape: tuple[int, int, int],
) -> tuple[tuple[int, int, int], int] | None:
    """Return (patch, given frames) under which every slice moves exactly its own tokens."""
    if any(tokens is None for _, _, tokens in patterns):
        return None
    by_axis = {a: [t for axis, _, t in patterns if axis == a and t is not None] for a in axes}
    given = next((i for i, tokens in enumerate(by_axis[axes[1]]) if tokens.any()), shape[0])
    patch = tuple(_period(by_axis[a][given if k == 0 else 0 :]) for k, a in enumerate(axes[1:]))
    if given >= shape[0] or any(n % p for n, p in zip(shape, patch, strict=True)) or given % patch[0]:
        return None
    found = cast("tuple[int, int, int]", patch)
    return (found, given) if all(_own(by_axis, axes, shape, found, given)) else None


def _own(
    by_axis: dict[int, list[torch.Tensor]],
    axes: tuple[int, int, int, int],
    shape: tuple[int, int, int],
    patch: tuple[int, int, int],
    given: int,
) -> Iterator[bool]:
    grid = tuple(n // p for n, p in zip(shape, patch, strict=True))
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")).flatten(1)
    generated = place[0] >= given // patch[0]
    for k, axis in enumerate(axes):
        for index, tokens in enumerate(by_axis[axis]):
            own = generated if k == 0 else generated & (place[k - 1] == index // patch[k - 1])
            yield tokens.shape == own.shape and bool((tokens.cpu() == own).all())


def _period(tokens: list[torch.Tensor]) -> int:
    """Return how many slices from the first on move the same tokens."""
    return next((i for i, t in enumerate(tokens) if not torch.equal(t, tokens[0])), len(tokens))
