"""A tiny random SkyReels V2 text-to-video pipeline: cross-attention, one denoiser call a branch, UniPC solver."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel, UniPCMultistepScheduler

from tests.families._weights import randomise

CHANNELS, FRAMES, HEIGHT, WIDTH = 4, 4, 4, 6
TEXT_TOKENS, TEXT_DIM = 5, 16


def build(seed: int = 0) -> SkyReelsV2Pipeline:
    """Return the pipeline: 3 blocks of 2 heads; no encoder and no codec."""
    transformer = SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    randomise(transformer, seed)
    transformer.proj_out.weight.mul_(0.5)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = SkyReelsV2Pipeline(tokenizer=None, text_encoder=None, transformer=transformer, vae=None, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(
    pipe: SkyReelsV2Pipeline, *, steps: int = 4, guidance: bool = True
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the shared arguments and the per-run tensors: row 0 the clean prompt, row 1 the corrupted one."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=generator)
    # What the tokens of a prompt share keeps prompts apart however many tokens an attention averages.
    shared_part = torch.randn(3, 1, TEXT_DIM, generator=generator)
    prompts, negative = (shared_part + torch.randn(3, TEXT_TOKENS, TEXT_DIM, generator=generator)).split((2, 1))
    shared = {
        "height": 8 * HEIGHT,
        "width": 8 * WIDTH,
        "num_frames": 4 * (FRAMES - 1) + 1,
        "num_inference_steps": steps,
        "guidance_scale": 2.0 if guidance else 1.0,
    }
    per_run = {
        "latents": noise.repeat(2, 1, 1, 1, 1),
        "prompt_embeds": prompts,
        "negative_prompt_embeds": negative.repeat(2, 1, 1),
    }
    return shared, per_run
