"""A tiny random Mochi pipeline: joint attention over ragged text, both guidance branches in one denoiser call."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
from diffusers.models.transformers.transformer_mochi import MochiRoPE

from tests.families._weights import randomise

CHANNELS, FRAMES, HEIGHT, WIDTH = 4, 4, 4, 6
TEXT_TOKENS, TEXT_DIM = 7, 16


class _FloatRoPE(MochiRoPE):
    """The family's rotary angles without its autocast to fp32: they are fp32 here, and torch warns of it on a CPU."""

    def _create_rope(self, freqs: torch.Tensor, pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.einsum("nd,dhf->nhf", pos, freqs)
        return angles.cos(), angles.sin()


def build(seed: int = 0) -> MochiPipeline:
    """Return the pipeline: 3 joint blocks of 2 heads, the last of which drops its text; no encoder and no codec."""
    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=12,
        in_channels=CHANNELS,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=16,
        max_sequence_length=TEXT_TOKENS,
    )
    randomise(transformer, seed)
    transformer.rope = _FloatRoPE()
    transformer.proj_out.weight.mul_(0.5)
    # The published scheduler config: the model's time runs from noise at 0, so timesteps and sigmas are inverted.
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipe = MochiPipeline(scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(
    pipe: MochiPipeline, *, steps: int = 4, guidance: bool = True
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the shared arguments and the per-run tensors: row 0 the clean prompt, row 1 the corrupted one."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, CHANNELS, FRAMES, HEIGHT, WIDTH, generator=generator)
    prompts, negative = torch.randn(3, TEXT_TOKENS, TEXT_DIM, generator=generator).split((2, 1))
    position = torch.arange(TEXT_TOKENS)
    shared = {
        "height": 8 * HEIGHT,
        "width": 8 * WIDTH,
        "num_frames": 6 * (FRAMES - 1) + 1,
        "num_inference_steps": steps,
        "guidance_scale": 2.0 if guidance else 1.0,
    }
    per_run = {
        "latents": noise.repeat(2, 1, 1, 1, 1),
        "prompt_embeds": prompts,
        "prompt_attention_mask": torch.stack([position < 5, position < 6]),
        "negative_prompt_embeds": negative.repeat(2, 1, 1),
        "negative_prompt_attention_mask": torch.stack([position < 4, position < 4]),
    }
    return shared, per_run
