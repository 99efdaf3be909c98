"""Tiny random Wan 2.1 text-to-video pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from tests.families._weights import normal, randomise

LATENT_SHAPE = (4, 5, 4, 6)
"""Channels, frames, height, width: 5 frames of 2 x 3 tokens."""
TEXT_LENGTH, TEXT_DIM = 6, 12


def transformer(seed: int, **overrides: Any) -> WanTransformer3DModel:
    """Build the denoiser; ``overrides`` replace entries of its config."""
    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": LATENT_SHAPE[0],
        "out_channels": LATENT_SHAPE[0],
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    }
    return randomise(WanTransformer3DModel(**{**config, **overrides}), seed)


def scheduler(flow_shift: float) -> UniPCMultistepScheduler:
    """Build the scheduler of the published checkpoints."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


def build(seed: int = 0) -> WanPipeline:
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler(3.0), transformer=transformer(seed)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(
    pipe: Any, *, steps: int = 4, guidance: bool = True, text_length: int = TEXT_LENGTH
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    _, frames, height, width = LATENT_SHAPE
    shared = {
        "height": height * pipe.vae_scale_factor_spatial,
        "width": width * pipe.vae_scale_factor_spatial,
        "num_frames": (frames - 1) * pipe.vae_scale_factor_temporal + 1,
        "num_inference_steps": steps,
        "guidance_scale": 2.0 if guidance else 1.0,
    }
    per_run = {
        "latents": normal(1, 1, *LATENT_SHAPE).repeat(2, 1, 1, 1, 1),
        # What the tokens of a prompt share keeps prompts apart however many tokens are averaged.
        "prompt_embeds": normal(2, 2, 1, TEXT_DIM) + 0.5 * normal(3, 2, text_length, TEXT_DIM),
    }
    if guidance:
        per_run["negative_prompt_embeds"] = normal(4, 1, text_length, TEXT_DIM).repeat(2, 1, 1)
    return shared, per_run
