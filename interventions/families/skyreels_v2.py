"""SkyReels V2 text-to-video: the blocks of Wan, and a multistep solver."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from interventions.families.draw import PLAIN, draw, drawn_prompts, encoded, smallest, twice
from interventions.families.family import Config, Family, register_family
from interventions.families.pixels import Pixels, decode_normalised
from interventions.families.wan import BLOCKS


def _ratios(config: Config) -> tuple[int, int]:
    halvings = config["temperal_downsample"]
    return 2 ** sum(halvings), 2 ** len(halvings)


def _example(pipe: Any, steps: int, guidance: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config, strides = pipe.transformer.config, (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial)
    shared, extent = smallest(config.patch_size, strides, steps, guidance)
    latents = twice(draw(pipe, 1, config.in_channels, *extent))
    return shared, {"latents": latents, **drawn_prompts(pipe, 16, config.text_dim, guidance)}


SKYREELS_V2 = register_family(
    Family(
        name="skyreels_v2",
        title="SkyReels V2 T2V",
        pipelines=("SkyReelsV2Pipeline",),
        blocks=(BLOCKS,),
        example=_example,
        # What the pipeline's own call asks for; the default of encode_prompt is shorter.
        encode=partial(encoded, names=PLAIN, max_sequence_length=512),
        pixels=Pixels(ratios=_ratios, decode=decode_normalised),
    )
)
