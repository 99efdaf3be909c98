"""Tiny random LTX-Video text-to-video pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

from tests.families._weights import normal, randomise

CHANNELS, FRAMES, HEIGHT, WIDTH = 4, 5, 2, 3
"""Extent of the latents; a latent pixel is a token."""
TEXT_LENGTH, TEXT_DIM = 6, 12


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the scheduler of the published checkpoints."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )


def build(seed: int = 0) -> LTXPipeline:
    transformer = LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=3,
        caption_channels=TEXT_DIM,
    )
    pipe = LTXPipeline(
        scheduler=scheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(transformer, seed),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text(guidance: bool, width: int = TEXT_DIM, length: int = TEXT_LENGTH) -> dict[str, torch.Tensor]:
    """Return prompts of unequal length, padded on the right, and one negative prompt for both rows."""
    position = torch.arange(length)
    tensors = {
        "prompt_embeds": normal(2, 2, 1, width) + 0.5 * normal(3, 2, length, width),
        "prompt_attention_mask": torch.stack([position < length - 1, position < length - 2]).long(),
    }
    if guidance:
        tensors["negative_prompt_embeds"] = normal(4, 1, length, width).repeat(2, 1, 1)
        tensors["negative_prompt_attention_mask"] = (position < length - 3).long().repeat(2, 1)
    return tensors


def arguments(pipe: Any, *, steps: int = 4, guidance: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    shared = {
        "height": HEIGHT * pipe.vae_spatial_compression_ratio,
        "width": WIDTH * pipe.vae_spatial_compression_ratio,
        "num_frames": (FRAMES - 1) * pipe.vae_temporal_compression_ratio + 1,
        "num_inference_steps": steps,
        "guidance_scale": 3.0 if guidance else 1.0,
    }
    latents = normal(1, 1, FRAMES * HEIGHT * WIDTH, CHANNELS).repeat(2, 1, 1)
    return shared, {"latents": latents, **text(guidance)}
