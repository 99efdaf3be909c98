"""Views of a model's tensors: rows and tokens of a block's value, axes of latents, rows of a denoiser's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from interventions.families.family import Blocks, LatentLayout, Tap, TokenLayout
from interventions.sites import Geometry, Stream


def to_rows(value: torch.Tensor, layout: TokenLayout, geometry: Geometry) -> torch.Tensor:
    """View a block's tensor as (batch, tokens, channels), tokens frame by frame."""
    if layout == "frames":
        return value.unflatten(0, (-1, geometry.frames)).flatten(1, 2)
    if layout == "places":
        return value.unflatten(0, (-1, geometry.tokens_per_frame)).transpose(1, 2).flatten(1, 2)
    # Convolutions between blocks' parts hold tokens as (frames, height, width).
    return value.flatten(1, -2)


def from_rows(value: torch.Tensor, layout: TokenLayout, geometry: Geometry) -> torch.Tensor:
    """Undo ``to_rows``."""
    if layout == "frames":
        return value.unflatten(1, (geometry.frames, -1)).flatten(0, 1)
    if layout == "places":
        return value.unflatten(1, (geometry.frames, -1)).transpose(1, 2).flatten(0, 1)
    return value


def read_tap(raw: Any, tap: Tap, blocks: Blocks, stream: Stream, geometry: Geometry) -> torch.Tensor:
    """Return a component's tokens, (batch, tokens, channels), out of what its module takes or gives."""
    value = to_rows(raw if tap.index is None else raw[tap.index], blocks.layout, geometry)
    return value[:, _part(tap, stream, geometry)]


def write_tap(raw: Any, new: torch.Tensor, tap: Tap, blocks: Blocks, stream: Stream, geometry: Geometry) -> Any:
    """Return ``raw`` with a component's tokens replaced by ``new``; ``raw`` itself is left alone."""
    old = raw if tap.index is None else raw[tap.index]
    if tap.part != "all":
        whole = to_rows(old, blocks.layout, geometry).clone()
        whole[:, _part(tap, stream, geometry)] = new
        new = whole
    value = from_rows(new, blocks.layout, geometry).reshape(old.shape)
    if tap.index is None:
        return value
    return tuple(value if i == tap.index else part for i, part in enumerate(raw))


def _part(tap: Tap, stream: Stream, geometry: Geometry) -> slice:
    # The number of video tokens is known before a run; the number of text tokens only follows from it.
    n = geometry.tokens
    if tap.part == "all":
        return slice(None)
    if stream == "video":
        return slice(None, n) if tap.part == "first" else slice(-n, None)
    return slice(None, -n) if tap.part == "first" else slice(n, None)


def to_canonical(latents: torch.Tensor, layout: LatentLayout, shape: tuple[int, int, int]) -> torch.Tensor:
    """View latents of a loop as (rows, C, F, H, W); ``shape`` is (F, H, W)."""
    if layout == "FCHW":
        return latents.transpose(1, 2)
    if layout == "FHWC":
        return latents.movedim(-1, 1)
    if layout == "packed":
        return latents.unflatten(1, shape).movedim(-1, 1)
    return latents


def from_canonical(latents: torch.Tensor, layout: LatentLayout) -> torch.Tensor:
    """Undo ``to_canonical``."""
    if layout == "FCHW":
        return latents.transpose(1, 2)
    if layout == "FHWC":
        return latents.movedim(1, -1)
    if layout == "packed":
        return latents.movedim(1, -1).flatten(1, 3)
    return latents


def gather(output: Any, rows: Sequence[int]) -> Any:
    """Gather rows of every tensor in what a denoiser returned: a tensor, a tuple, or a diffusers output."""
    if isinstance(output, torch.Tensor):
        return output[list(rows)]
    if isinstance(output, dict):
        return type(output)(**{name: gather(value, rows) for name, value in output.items()})
    if isinstance(output, (tuple, list)):
        return type(output)(gather(value, rows) for value in output)
    return output


def main_tensor(output: Any) -> torch.Tensor:
    """Return the prediction in what a denoiser returned: the tensor itself or the first one inside."""
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def with_main_tensor(output: Any, new: torch.Tensor) -> Any:
    """Return a denoiser's output with its prediction replaced."""
    if isinstance(output, torch.Tensor):
        return new
    if isinstance(output, dict):
        first = next(iter(output))
        return type(output)(**{k: with_main_tensor(v, new) if k == first else v for k, v in output.items()})
    return type(output)([with_main_tensor(output[0], new), *output[1:]])


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], where: tuple[int, str]) -> Any:
    """Return a call's argument by position or name."""
    position, name = where
    return kwargs[name] if name in kwargs else args[position]


def with_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], where: tuple[int, str], value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with one replaced."""
    position, name = where
    if name in kwargs:
        return args, {**kwargs, name: value}
    return (*args[:position], value, *args[position + 1 :]), kwargs
