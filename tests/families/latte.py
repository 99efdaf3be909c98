"""A tiny random Latte pipeline: spatial and temporal blocks take turns, frames or positions folded into the batch."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

from tests.families._weights import randomise

CHANNELS, FRAMES, HEIGHT, WIDTH = 4, 4, 4, 6
TEXT_TOKENS, TEXT_DIM = 5, 16


def build(seed: int = 0) -> LattePipeline:
    """Return the pipeline: 2 spatial and 2 temporal blocks of 2 heads; no encoder and no codec."""
    transformer = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=2,
        cross_attention_dim=24,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_DIM,
        video_length=FRAMES,
    )
    randomise(transformer, seed)
    transformer.proj_out.weight.mul_(0.5)
    # Few betas: an untrained denoiser takes no noise away, and published ones divide it by a signal of 0.006.
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.002, clip_sample=False, timestep_spacing="trailing")
    pipe = LattePipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(
    pipe: LattePipeline, *, steps: int = 4, guidance: bool = True
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the shared arguments and the per-run tensors: row 0 the clean prompt, row 1 the corrupted one."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=generator)
    # What the tokens of a prompt share keeps prompts apart however many tokens an attention averages.
    shared_part = torch.randn(3, 1, TEXT_DIM, generator=generator)
    prompts, negative = (shared_part + torch.randn(3, TEXT_TOKENS, TEXT_DIM, generator=generator)).split((2, 1))
    shared = {
        "negative_prompt": None,
        "height": 8 * HEIGHT,
        "width": 8 * WIDTH,
        "video_length": FRAMES,
        "num_inference_steps": steps,
        "guidance_scale": 2.0 if guidance else 1.0,
    }
    per_run = {
        "latents": noise.repeat(2, 1, 1, 1, 1),
        "prompt_embeds": prompts,
        "negative_prompt_embeds": negative.repeat(2, 1, 1),
    }
    return shared, per_run
