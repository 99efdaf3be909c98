"""A tiny random Cosmos text-to-world pipeline: cross-attention, one denoiser call a branch, EDM solver."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CosmosTextToWorldPipeline, CosmosTransformer3DModel, EDMEulerScheduler

from tests.families._weights import randomise

CHANNELS, FRAMES, HEIGHT, WIDTH = 4, 4, 4, 6
TEXT_TOKENS, TEXT_DIM = 5, 16


class _UnusedChecker:
    """What the pipeline insists on moving about; it would see text prompts and decoded frames, and there are none."""

    def to(self, device: str | torch.device) -> _UnusedChecker:
        return self


def build(seed: int = 0) -> CosmosTextToWorldPipeline:
    """Return the pipeline: 3 blocks of 2 heads; no encoder and no codec."""
    transformer = CosmosTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        adaln_lora_dim=8,
        max_size=(8, 16, 16),
        patch_size=(1, 2, 2),
        # The padding channel is all zeros in text-to-world, and resizing it would need torchvision.
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )
    randomise(transformer, seed)
    # Noise levels nearer to the data's 0.5 than the published 80 to 0.002, so that each of a few steps counts.
    scheduler = EDMEulerScheduler(sigma_min=0.2, sigma_max=20.0, sigma_data=0.5)
    pipe = CosmosTextToWorldPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=None,
        scheduler=scheduler,
        safety_checker=_UnusedChecker(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(
    pipe: CosmosTextToWorldPipeline, *, steps: int = 4, guidance: bool = True
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the shared arguments and the per-run tensors: row 0 the clean prompt, row 1 the corrupted one."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=generator)
    prompts, negative = torch.randn(3, TEXT_TOKENS, TEXT_DIM, generator=generator).split((2, 1))
    shared = {
        "height": 8 * HEIGHT,
        "width": 8 * WIDTH,
        "num_frames": 8 * (FRAMES - 1) + 1,
        "num_inference_steps": steps,
        "guidance_scale": 2.0 if guidance else 1.0,
    }
    per_run = {
        "latents": noise.repeat(2, 1, 1, 1, 1),
        "prompt_embeds": prompts,
        "negative_prompt_embeds": negative.repeat(2, 1, 1),
    }
    return shared, per_run
