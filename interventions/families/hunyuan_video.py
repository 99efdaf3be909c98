"""HunyuanVideo: blocks with one stream for video and one for text, then blocks with one stream for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from interventions.families.draw import FRAMES, HEIGHT, WIDTH, draw, masked_prompts, twice
from interventions.families.family import Attention, Blocks, Config, Family, Tap, register_family
from interventions.families.pixels import Pixels, decode_scaled

JOINT = Attention(path="attn", order="video_text")
DUAL = Blocks(
    path="transformer_blocks",
    taps={
        "attn1.heads": Tap(path="attn.to_out.0", end="input"),
        "attn1": Tap(path="attn", index=0),
        "attn1.text": Tap(path="attn", index=1),
        "ffn": Tap(path="ff"),
        "ffn.text": Tap(path="ff_context"),
        "residual": Tap(index=0),
        "residual.text": Tap(index=1),
    },
    attention={"attn1": JOINT},
)
# Attention and MLP run side by side into one output projection, so both are taken before it.
SINGLE = Blocks(
    path="single_transformer_blocks",
    count="num_single_layers",
    taps={
        "ffn": Tap(path="act_mlp", part="first"),
        "ffn.text": Tap(path="act_mlp", part="last"),
        "attn1.heads": Tap(path="attn", index=0),
        "attn1": Tap(path="attn", index=0),
        "attn1.text": Tap(path="attn", index=1),
        "residual": Tap(index=0),
        "residual.text": Tap(index=1),
    },
    attention={"attn1": JOINT},
)


def _guidance(shared: Mapping[str, Any]) -> bool:
    return float(shared.get("true_cfg_scale", 1.0)) > 1


def set_even_steps(scheduler: Any, steps: int, latent_shape: tuple[int, int, int]) -> None:
    """Set even sigmas from 1 down, as the pipelines do."""
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])


def square_patch(config: Config) -> tuple[int, int, int]:
    """Return the patch of a config that holds one number for both sides."""
    return config["patch_size_t"], config["patch_size"], config["patch_size"]


def _example(pipe: Any, steps: int, guidance: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = pipe.transformer.config
    frames, height, width = (n * p for n, p in zip((FRAMES, HEIGHT, WIDTH), square_patch(config), strict=True))
    shared = {
        "height": height * pipe.vae_scale_factor_spatial,
        "width": width * pipe.vae_scale_factor_spatial,
        "num_frames": (frames - 1) * pipe.vae_scale_factor_temporal + 1,
        "num_inference_steps": steps,
        "true_cfg_scale": 2.0 if guidance else 1.0,
    }
    prompts = masked_prompts(pipe, 16, config.text_embed_dim, guidance)
    pooled = draw(pipe, 5, 3, config.pooled_projection_dim).to(pipe.transformer.dtype)
    prompts["pooled_prompt_embeds"] = pooled[:2]
    if guidance:
        prompts["negative_pooled_prompt_embeds"] = twice(pooled[2])
    return shared, {"latents": twice(draw(pipe, 1, config.in_channels, frames, height, width)), **prompts}


@torch.no_grad()
def _encode(pipe: Any, prompts: Sequence[str], guided: bool, negative: str | None = None) -> dict[str, torch.Tensor]:
    names = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
    encoded = dict(zip(names, pipe.encode_prompt(list(prompts)), strict=True))
    if guided:
        uncond = pipe.encode_prompt([negative or ""] * len(prompts))
        encoded |= {f"negative_{name}": tensor for name, tensor in zip(names, uncond, strict=True)}
    return encoded


HUNYUAN_VIDEO = register_family(
    Family(
        name="hunyuan_video",
        title="HunyuanVideo",
        pipelines=("HunyuanVideoPipeline",),
        blocks=(DUAL, SINGLE),
        conditioning=("encoder_hidden_states", "encoder_attention_mask", "pooled_projections"),
        guidance=_guidance,
        guided=lambda scale: {"true_cfg_scale": scale},
        set_steps=set_even_steps,
        patch=square_patch,
        example=_example,
        encode=_encode,
        pixels=Pixels(decode=decode_scaled),
        notes=(
            "Guidance is true_cfg_scale, as guidance_scale is only told to the model. In single-stream blocks attn1 "
            "and ffn are what enters the shared output projection, ffn after its activation."
        ),
    )
)
