"""A tiny random HunyuanVideo 1.5 pipeline: joint attention over two masked prompts, a guider for the branches."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)

from tests.families._weights import randomise

CHANNELS, FRAMES, HEIGHT, WIDTH = 4, 4, 2, 3
TEXT_TOKENS, TEXT_DIM = 6, 16
GLYPH_TOKENS, GLYPH_DIM = 3, 10


def build(seed: int = 0) -> HunyuanVideo15Pipeline:
    """Return the pipeline: 3 joint blocks of 2 heads, 2 text refiner blocks; no encoders. The codec gives sizes."""
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=2 * CHANNELS + 1,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        num_refiner_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=GLYPH_DIM,
        image_embed_dim=8,
        rope_axes_dim=(4, 4, 4),
        task_type="t2v",
    )
    randomise(transformer, seed)
    # Few text tokens among many video tokens: each has to say more to be heard.
    for block in transformer.transformer_blocks:
        block.attn.add_v_proj.weight.mul_(3.0)
    vae = AutoencoderKLHunyuanVideo15(latent_channels=CHANNELS, block_out_channels=(8,) * 5, layers_per_block=1)
    randomise(vae, seed)
    pipe = HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=2.0),
    )
    # The pipeline gives every prompt 729 masked image tokens, which would be all that a tiny run computes.
    pipe.vision_num_semantic_tokens = 2
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(
    pipe: HunyuanVideo15Pipeline, *, steps: int = 4, guidance: bool = True
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the shared arguments and the per-run tensors; guidance is switched on the pipeline's guider.

    Row 0 is the clean prompt and row 1 the corrupted one.
    """
    (pipe.guider.enable if guidance else pipe.guider.disable)()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=generator)
    prompts, negative = torch.randn(3, TEXT_TOKENS, TEXT_DIM, generator=generator).split((2, 1))
    glyphs, no_glyphs = torch.randn(3, GLYPH_TOKENS, GLYPH_DIM, generator=generator).split((2, 1))
    text, glyph = torch.arange(TEXT_TOKENS), torch.arange(GLYPH_TOKENS)
    shared = {"height": 16 * HEIGHT, "width": 16 * WIDTH, "num_frames": 4 * (FRAMES - 1) + 1}
    per_run = {
        "latents": noise.repeat(2, 1, 1, 1, 1),
        "prompt_embeds": prompts,
        "prompt_embeds_mask": torch.stack([text < 5, text < 6]).float(),
        "prompt_embeds_2": glyphs,
        "prompt_embeds_mask_2": torch.stack([glyph < 2, glyph < 1]).float(),
        "negative_prompt_embeds": negative.repeat(2, 1, 1),
        "negative_prompt_embeds_mask": torch.stack([text < 4, text < 4]).float(),
        "negative_prompt_embeds_2": no_glyphs.repeat(2, 1, 1),
        "negative_prompt_embeds_mask_2": torch.stack([glyph < 1, glyph < 1]).float(),
    }
    return {**shared, "num_inference_steps": steps}, per_run
