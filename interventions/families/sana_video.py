"""Sana-Video: linear self-attention, cross-attention to masked text, a feed-forward that convolves over frames."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from interventions.families.draw import MASKED, draw, encoded, masked_prompts, smallest, twice
from interventions.families.family import Attention, Config, Family, register_family
from interventions.families.ltx import BLOCKS
from interventions.families.pixels import Pixels, decode_normalised, scaling_ratios, wan_ratios

SIDE = 32
"""Pixels that the pipeline wants both sides of a frame to be a multiple of."""
# Its self-attention sums key features before any query meets them, so no edge between frames exists to be cut.
LINEAR_BLOCKS = replace(BLOCKS, attention={"attn2": Attention(path="attn2", order="cross")})


def _heads(config: Config) -> int:
    own, cross = int(config["num_attention_heads"]), int(config["num_cross_attention_heads"])
    return own if own == cross else 0


def _ratios(config: Config) -> tuple[int, int]:
    return wan_ratios(config) if "scale_factor_temporal" in config else scaling_ratios(config)


def _size(frames: int, height: int, width: int) -> dict[str, Any]:
    # Its default negative prompt is a text, which the pipeline refuses beside embeddings.
    size = {"frames": frames, "height": height, "width": width}
    return {**size, "negative_prompt": None, "use_resolution_binning": False}


def _example(pipe: Any, steps: int, guidance: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config, spatial = pipe.transformer.config, pipe.vae_scale_factor_spatial
    shared, (frames, height, width) = smallest(
        config.patch_size, (pipe.vae_scale_factor_temporal, spatial), steps, guidance
    )
    height, width = (-(-side * spatial // SIDE) * SIDE // spatial for side in (height, width))
    shared |= {"frames": shared.pop("num_frames"), "height": height * spatial, "width": width * spatial}
    shared |= {"negative_prompt": None, "use_resolution_binning": False}
    latents = twice(draw(pipe, 1, config.in_channels, frames, height, width))
    return shared, {"latents": latents, **masked_prompts(pipe, 16, config.caption_channels, guidance)}


def _encode(pipe: Any, prompts: Sequence[str], guided: bool, negative: str | None = None) -> dict[str, torch.Tensor]:
    # What the pipeline's own call puts before a prompt.
    name = "complex_human_instruction"
    instruction = inspect.signature(type(pipe).__call__).parameters[name].default
    return encoded(pipe, prompts, guided, negative, names=MASKED, **{name: instruction})


SANA_VIDEO = register_family(
    Family(
        name="sana_video",
        title="Sana-Video",
        pipelines=("SanaVideoPipeline",),
        blocks=(LINEAR_BLOCKS,),
        conditioning=("encoder_hidden_states", "encoder_attention_mask"),
        calls={True: (("uncond", "cond"),), False: (("cond",),)},
        heads=_heads,
        example=_example,
        encode=_encode,
        pixels=Pixels(ratios=_ratios, multiple=SIDE, size=_size, decode=decode_normalised),
        notes=(
            "Self-attention is linear and its edges cannot be cut; ffn mixes neighbouring places and frames. Set "
            "use_resolution_binning to false, or the size of the video may be changed."
        ),
    )
)
