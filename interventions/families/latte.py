"""Latte: blocks over the places of a frame and blocks over the frames of a place take turns; guidance in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from interventions.families.draw import PLAIN, draw, drawn_prompts, encoded, smallest, twice
from interventions.families.family import Attention, Config, Family, register_family
from interventions.families.ltx import BLOCKS
from interventions.families.pixels import Pixels, model_latents

SPATIAL = replace(BLOCKS, layout="frames", attention={"attn2": Attention(path="attn2", order="cross")})
TEMPORAL = replace(
    BLOCKS,
    path="temporal_transformer_blocks",
    layout="places",
    taps={key: tap for key, tap in BLOCKS.taps.items() if not key.startswith("attn2")},
    attention={"attn1": Attention(path="attn1", order="video")},
)


def _patch(config: Config) -> tuple[int, int, int]:
    return 1, config["patch_size"], config["patch_size"]


def _size(frames: int, height: int, width: int) -> dict[str, Any]:
    # Its default negative prompt is a text, which the pipeline refuses beside embeddings.
    return {"video_length": frames, "height": height, "width": width, "negative_prompt": None}


@torch.no_grad()
def _decode(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    return pipe.decode_latents(latents.to(pipe.vae.dtype), latents.shape[2])


def _example(pipe: Any, steps: int, guidance: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = pipe.transformer.config
    shared, (_, height, width) = smallest(_patch(config), (1, pipe.vae_scale_factor), steps, guidance)
    del shared["num_frames"]
    # Position embeddings that are added over frames fix their number.
    shared |= {"video_length": config.video_length, "negative_prompt": None}
    latents = twice(draw(pipe, 1, config.in_channels, config.video_length, height, width))
    # Without negative prompts the pipeline would mask embeddings that it takes for unmasked.
    prompts = drawn_prompts(pipe, 16, config.caption_channels, True)
    return shared, {"latents": latents.to(pipe.transformer.dtype), **prompts}


def _encode(pipe: Any, prompts: Sequence[str], guided: bool, negative: str | None = None) -> dict[str, torch.Tensor]:
    # What the pipeline's own call asks for; and negative prompts in any case, for the reason of the example.
    return encoded(pipe, prompts, True, negative, names=PLAIN, clean_caption=True)


LATTE = register_family(
    Family(
        name="latte",
        title="Latte 1",
        pipelines=("LattePipeline",),
        blocks=(SPATIAL, TEMPORAL),
        interleaved=True,
        calls={True: (("uncond", "cond"),), False: (("cond",),)},
        patch=_patch,
        example=_example,
        encode=_encode,
        pixels=Pixels(
            ratios=lambda config: (1, 2 ** (len(config["block_out_channels"]) - 1)),
            multiple=8,
            size=_size,
            only_frames=lambda config: int(config["video_length"]),
            latents=model_latents,
            decode=_decode,
        ),
        notes=(
            "Even blocks attend within a frame and to the text, odd ones between the frames of a place. Give negative "
            "embeddings even without guidance, and set negative_prompt to null beside them."
        ),
    )
)
