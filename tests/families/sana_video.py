"""A tiny random Sana-Video pipeline: linear self-attention, temporal convolution, DPM-Solver multistep."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, SanaVideoPipeline, SanaVideoTransformer3DModel

from tests.families._weights import randomise

CHANNELS, FRAMES, HEIGHT, WIDTH = 4, 4, 4, 8
TEXT_TOKENS, TEXT_DIM = 6, 16


def build(seed: int = 0) -> SanaVideoPipeline:
    """Return the pipeline: 3 blocks of 2 heads; no encoder and no codec."""
    transformer = SanaVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=18,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=18,
        cross_attention_dim=36,
        caption_channels=TEXT_DIM,
        mlp_ratio=2.0,
        patch_size=(1, 2, 2),
        rope_max_seq_len=32,
    )
    randomise(transformer, seed)
    transformer.proj_out.weight.mul_(0.5)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = SanaVideoPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(
    pipe: SanaVideoPipeline, *, steps: int = 4, guidance: bool = True
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
        "frames": 4 * (FRAMES - 1) + 1,
        "use_resolution_binning": False,
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
