"""Allegro: cross-attention to masked text; guidance in one call; a solver that draws noise."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from interventions.families.draw import MASKED, draw, encoded, masked_prompts, smallest, twice
from interventions.families.family import Family, register_family
from interventions.families.hunyuan_video import square_patch
from interventions.families.ltx import BLOCKS
from interventions.families.pixels import Pixels, block_ratios, model_latents


def _size(frames: int, height: int, width: int) -> dict[str, Any]:
    # Its default negative prompt is a text, which the pipeline refuses beside embeddings.
    return {"num_frames": frames, "height": height, "width": width, "negative_prompt": None}


def _example(pipe: Any, steps: int, guidance: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config, strides = pipe.transformer.config, (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial)
    shared, extent = smallest(square_patch(config), strides, steps, guidance)
    latents = twice(draw(pipe, 1, config.in_channels, *extent)).to(pipe.transformer.dtype)
    prompts = masked_prompts(pipe, 16, config.caption_channels, guidance)
    # Its default is a prompt, which the pipeline refuses beside embeddings.
    return {**shared, "negative_prompt": None}, {"latents": latents, **prompts}


ALLEGRO = register_family(
    Family(
        name="allegro",
        title="Allegro",
        pipelines=("AllegroPipeline",),
        blocks=(BLOCKS,),
        conditioning=("encoder_hidden_states", "encoder_attention_mask"),
        calls={True: (("uncond", "cond"),), False: (("cond",),)},
        patch=square_patch,
        example=_example,
        # What the pipeline's own call asks for.
        encode=partial(encoded, names=MASKED, clean_caption=True),
        # Its VAE decodes in tiles of a fixed size alone.
        pixels=Pixels(ratios=block_ratios, multiple=8, size=_size, latents=model_latents),
        notes=(
            "The published solver draws noise: every run of a sample is given the same. Set negative_prompt to null "
            "beside embeddings."
        ),
    )
)
