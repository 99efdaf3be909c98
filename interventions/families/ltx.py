"""LTX-Video: packed latents, a latent pixel is a token; text by cross-attention; guidance in one call."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from interventions.families.draw import FRAMES, HEIGHT, MASKED, WIDTH, draw, encoded, masked_prompts, twice
from interventions.families.family import Attention, Blocks, Family, Tap, register_family
from interventions.families.pixels import Pixels, scaling_ratios

BLOCKS = Blocks(
    path="transformer_blocks",
    taps={
        "attn1.heads": Tap(path="attn1.to_out.0", end="input"),
        "attn1": Tap(path="attn1"),
        "attn2.heads": Tap(path="attn2.to_out.0", end="input"),
        "attn2": Tap(path="attn2"),
        "ffn": Tap(path="ff"),
        "residual": Tap(),
    },
    attention={"attn1": Attention(path="attn1", order="video"), "attn2": Attention(path="attn2", order="cross")},
)


def set_shifted_steps(scheduler: Any, steps: int, latent_shape: tuple[int, int, int]) -> None:
    """Set even sigmas shifted by the number of tokens, as ``calculate_shift`` of the pipelines does."""
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    tokens = latent_shape[0] * latent_shape[1] * latent_shape[2]
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)


def packed_extent(pipe: Any, shared: Mapping[str, Any], latents: torch.Tensor) -> tuple[int, int, int]:
    """Return (frames, height, width) of packed latents from the size of the video.

    Raises
    ------
    ValueError : the latents are not packed, or have another number of tokens.
    """
    frames = (int(shared["num_frames"]) - 1) // pipe.vae_temporal_compression_ratio + 1
    height, width = (int(shared[side]) // pipe.vae_spatial_compression_ratio for side in ("height", "width"))
    if latents.ndim != 3 or latents.shape[1] != frames * height * width:
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}; give (rows, tokens, channels) with {frames} x {height} x "
            f"{width} tokens, frame by frame, or another num_frames, height or width"
        )
    return frames, height, width


def packed_example(pipe: Any, steps: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Return shared arguments of a smallest run, and its latents, two equal rows."""
    shared = {
        "height": HEIGHT * pipe.vae_spatial_compression_ratio,
        "width": WIDTH * pipe.vae_spatial_compression_ratio,
        "num_frames": (FRAMES - 1) * pipe.vae_temporal_compression_ratio + 1,
        "num_inference_steps": steps,
    }
    return shared, twice(draw(pipe, 1, FRAMES * HEIGHT * WIDTH, pipe.transformer.config.in_channels))


def _example(pipe: Any, steps: int, guidance: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    shared, latents = packed_example(pipe, steps)
    prompts = masked_prompts(pipe, 16, pipe.transformer.config.caption_channels, guidance)
    return {**shared, "guidance_scale": 3.0 if guidance else 1.0}, {"latents": latents, **prompts}


@torch.no_grad()
def _decode(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    vae = pipe.vae
    mean, std = (s.view(1, -1, 1, 1, 1).to(latents) for s in (vae.latents_mean, vae.latents_std))
    latents = (latents * std / vae.config.scaling_factor + mean).to(vae.dtype)
    # The pipeline's default: decoders that are told a noise level are told that there is none.
    level = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
    return vae.decode(latents, level, return_dict=False)[0]


LTX = register_family(
    Family(
        name="ltx",
        title="LTX-Video 0.9",
        pipelines=("LTXPipeline",),
        blocks=(BLOCKS,),
        conditioning=("encoder_hidden_states", "encoder_attention_mask"),
        calls={True: (("uncond", "cond"),), False: (("cond",),)},
        set_steps=set_shifted_steps,
        latent_layout="packed",
        extent=packed_extent,
        patch=lambda config: (1, 1, 1),
        example=_example,
        encode=partial(encoded, names=MASKED),
        pixels=Pixels(ratios=scaling_ratios, multiple=32, decode=_decode),
        notes="Latents go in and come out packed: (rows, tokens, channels), frame by frame.",
    )
)
