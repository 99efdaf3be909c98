"""Tiny random HunyuanVideo text-to-video pipeline, with true classifier-free guidance."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

from tests.families._weights import normal, randomise

CHANNELS, FRAMES, HEIGHT, WIDTH = 4, 5, 4, 6
"""Extent of the latents: 5 frames of 2 x 3 tokens."""
TEXT_LENGTH, TEXT_DIM, POOLED_DIM = 6, 12, 8


def build(seed: int = 0) -> HunyuanVideoPipeline:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        guidance_embeds=True,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=(4, 4, 4),
    )
    pipe = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(transformer, seed),
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(pipe: Any, *, steps: int = 4, guidance: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    shared = {
        "height": HEIGHT * pipe.vae_scale_factor_spatial,
        "width": WIDTH * pipe.vae_scale_factor_spatial,
        "num_frames": (FRAMES - 1) * pipe.vae_scale_factor_temporal + 1,
        "num_inference_steps": steps,
        "guidance_scale": 6.0,
        "true_cfg_scale": 2.0 if guidance else 1.0,
    }
    position = torch.arange(TEXT_LENGTH)
    per_run = {
        "latents": normal(1, 1, CHANNELS, FRAMES, HEIGHT, WIDTH).repeat(2, 1, 1, 1, 1),
        "prompt_embeds": normal(2, 2, 1, TEXT_DIM) + 0.5 * normal(3, 2, TEXT_LENGTH, TEXT_DIM),
        "prompt_attention_mask": torch.stack([position < TEXT_LENGTH - 1, position < TEXT_LENGTH - 2]).long(),
        "pooled_prompt_embeds": normal(5, 2, POOLED_DIM),
    }
    if guidance:
        per_run["negative_prompt_embeds"] = normal(4, 1, TEXT_LENGTH, TEXT_DIM).repeat(2, 1, 1)
        per_run["negative_prompt_attention_mask"] = (position < TEXT_LENGTH - 3).long().repeat(2, 1)
        per_run["negative_pooled_prompt_embeds"] = normal(6, 1, POOLED_DIM).repeat(2, 1)
    return shared, per_run
