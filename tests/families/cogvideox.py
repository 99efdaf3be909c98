"""Tiny random CogVideoX text-to-video pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

from tests.families._weights import normal, randomise

FRAMES, CHANNELS, HEIGHT, WIDTH = 5, 4, 4, 6
"""Extent of the latents in their own order: 5 frames of 2 x 3 tokens."""
TEXT_LENGTH, TEXT_DIM = 6, 12


def build(seed: int = 0) -> CogVideoXPipeline:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=16,
        text_embed_dim=TEXT_DIM,
        num_layers=3,
        sample_frames=(FRAMES - 1) * 4 + 1,
        sample_height=HEIGHT,
        sample_width=WIDTH,
        max_text_seq_length=TEXT_LENGTH,
        use_rotary_positional_embeddings=True,
    )
    pipe = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=randomise(transformer, seed),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
            clip_sample=False,
            timestep_spacing="trailing",
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(pipe: Any, *, steps: int = 4, guidance: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    shared = {
        "height": HEIGHT * pipe.vae_scale_factor_spatial,
        "width": WIDTH * pipe.vae_scale_factor_spatial,
        "num_frames": (FRAMES - 1) * pipe.vae_scale_factor_temporal + 1,
        "num_inference_steps": steps,
        "guidance_scale": 2.0 if guidance else 1.0,
    }
    per_run = {
        "latents": normal(1, 1, FRAMES, CHANNELS, HEIGHT, WIDTH).repeat(2, 1, 1, 1, 1),
        "prompt_embeds": normal(2, 2, 1, TEXT_DIM) + 0.5 * normal(3, 2, TEXT_LENGTH, TEXT_DIM),
    }
    if guidance:
        per_run["negative_prompt_embeds"] = normal(4, 1, TEXT_LENGTH, TEXT_DIM).repeat(2, 1, 1)
    return shared, per_run
