"""Cosmos-Predict1 text-to-world: cross-attention to text, one denoiser call a branch, guidance of clean estimates."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from interventions.families.draw import PLAIN, draw, drawn_prompts, encoded, smallest, twice
from interventions.families.family import Family, register_family
from interventions.families.ltx import BLOCKS
from interventions.families.pixels import Pixels


def _example(pipe: Any, steps: int, guidance: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config, strides = pipe.transformer.config, (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial)
    shared, extent = smallest(config.patch_size, strides, steps, guidance)
    latents = twice(draw(pipe, 1, config.in_channels, *extent))
    return shared, {"latents": latents, **drawn_prompts(pipe, 16, config.text_embed_dim, guidance)}


COSMOS = register_family(
    Family(
        name="cosmos",
        title="Cosmos-Predict1 text-to-world",
        pipelines=("CosmosTextToWorldPipeline",),
        blocks=(BLOCKS,),
        example=_example,
        encode=partial(encoded, names=PLAIN),
        # Its pipeline decodes through a safety checker that is a package of its own.
        pixels=Pixels(),
        notes=(
            "The prediction of a step is the guided clean estimate. Every block first adds its position embedding, "
            "which is part of its update."
        ),
    )
)
