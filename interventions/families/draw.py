"""Random inputs of a smallest run, for examples that work on any checkpoint of a family, and prompts encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

FRAMES, HEIGHT, WIDTH = 3, 2, 3
"""Extent of an example in tokens; three different numbers, so that no two axes can be confused."""


def draw(pipe: Any, seed: int, *shape: int) -> torch.Tensor:
    """Draw a standard normal float32 tensor on the CPU, the same for every device, and bring it to the pipeline's."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(pipe._execution_device)


def twice(tensor: torch.Tensor) -> torch.Tensor:
    """Return two equal rows."""
    return torch.stack([tensor, tensor])


def drawn_prompts(pipe: Any, length: int, width: int, guidance: bool) -> dict[str, torch.Tensor]:
    """Return embeddings of two different prompts, and of one negative prompt for both if guidance is on.

    What the tokens of a prompt share keeps prompts apart however many tokens a model averages over.
    """
    dtype = pipe.transformer.dtype
    embeds = {"prompt_embeds": (draw(pipe, 2, 2, 1, width) + 0.5 * draw(pipe, 3, 2, length, width)).to(dtype)}
    if guidance:
        embeds["negative_prompt_embeds"] = twice(draw(pipe, 4, length, width)).to(dtype)
    return embeds


def masked_prompts(pipe: Any, length: int, width: int, guidance: bool) -> dict[str, torch.Tensor]:
    """Return drawn prompts with attention masks by which all of their tokens count."""
    embeds = drawn_prompts(pipe, length, width, guidance)
    masks = {name.replace("embeds", "attention_mask"): e.new_ones(e.shape[:2]).long() for name, e in embeds.items()}
    return {**embeds, **masks}


def present(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the tensors that an ``encode_prompt`` gave, without those it left out."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


MASKED = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
PLAIN = ("prompt_embeds", "negative_prompt_embeds")
"""What most ``encode_prompt`` give, with masks and without."""


@torch.no_grad()
def encoded(
    pipe: Any, prompts: Sequence[str], guided: bool, negative: str | None = None, *, names: Sequence[str], **more: Any
) -> dict[str, torch.Tensor]:
    """Return what a pipeline's ``encode_prompt`` gives, by the names under which its call takes it.

    Without ``negative``, the negative prompt is the pipeline's own.
    """
    if negative is not None:
        more["negative_prompt"] = negative
    found = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=guided, **more)
    return present(**dict(zip(names, found, strict=True)))


def smallest(
    patch: Sequence[int], strides: tuple[int, int], steps: int, guidance: bool
) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Return shared arguments of a smallest run, and the (frames, height, width) of its latents.

    Parameters
    ----------
    patch : latents that a token covers, (frames, height, width).
    strides : frames and pixels of the video that a latent stands for.
    """
    frames, height, width = (n * p for n, p in zip((FRAMES, HEIGHT, WIDTH), patch, strict=True))
    temporal, spatial = strides
    shared = {
        "height": height * spatial,
        "width": width * spatial,
        "num_frames": (frames - 1) * temporal + 1,
        "num_inference_steps": steps,
        "guidance_scale": 3.0 if guidance else 1.0,
    }
    return shared, (frames, height, width)
