"""A tiny random Allegro pipeline: masked cross-attention, both guidance branches in one denoiser call, Euler solver."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AllegroPipeline, AllegroTransformer3DModel, EulerDiscreteScheduler

from tests.families._weights import randomise

CHANNELS, FRAMES, HEIGHT, WIDTH = 4, 4, 4, 6
TEXT_TOKENS, TEXT_DIM = 6, 16


def build(seed: int = 0) -> AllegroPipeline:
    """Return the pipeline: 3 blocks of 2 heads; no encoder and no codec."""
    transformer = AllegroTransformer3DModel(
        patch_size=2,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        cross_attention_dim=24,
        sample_height=HEIGHT,
        sample_width=WIDTH,
        sample_frames=FRAMES,
        caption_channels=TEXT_DIM,
    )
    randomise(transformer, seed)
    transformer.proj_out.weight.mul_(0.5)
    # The published solver is the ancestral form of this one, which draws noise that no argument can fix once for all
    # calls. Few betas: an untrained denoiser takes no noise away, so latents would stay as large as the first sigma.
    scheduler = EulerDiscreteScheduler(beta_start=0.0001, beta_end=0.002, timestep_spacing="trailing")
    pipe = AllegroPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(
    pipe: AllegroPipeline, *, steps: int = 4, guidance: bool = True
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the shared arguments and the per-run tensors: row 0 the clean prompt, row 1 the corrupted one."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=generator)
    # What the tokens of a prompt share keeps prompts apart however many tokens an attention averages.
    shared_part = torch.randn(3, 1, TEXT_DIM, generator=generator)
    prompts, negative = (shared_part + torch.randn(3, TEXT_TOKENS, TEXT_DIM, generator=generator)).split((2, 1))
    position = torch.arange(TEXT_TOKENS)
    shared = {
        "negative_prompt": None,
        "height": 8 * HEIGHT,
        "width": 8 * WIDTH,
        "num_frames": 4 * FRAMES,
        "num_inference_steps": steps,
        "guidance_scale": 2.0 if guidance else 1.0,
    }
    per_run = {
        "latents": noise.repeat(2, 1, 1, 1, 1),
        "prompt_embeds": prompts,
        "prompt_attention_mask": torch.stack([position < 5, position < 6]).long(),
        "negative_prompt_embeds": negative.repeat(2, 1, 1),
        "negative_prompt_attention_mask": torch.stack([position < 4, position < 4]).long(),
    }
    return shared, per_run
