"""A tiny random Kandinsky 5 text-to-video pipeline: channels-last latents, cross-attention, one call a branch."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5AttnProcessor

from tests.families._weights import randomise

CHANNELS, FRAMES, HEIGHT, WIDTH = 4, 4, 4, 6
TEXT_TOKENS, TEXT_DIM, POOLED_DIM = 5, 16, 10


class _FloatAttnProcessor(Kandinsky5AttnProcessor):
    """The family's dense attention without its rounding of rotated queries and keys to bfloat16.

    The rounding turns a last-bit difference, such as that between batch sizes, into one of 1e-4.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, rotary_emb=None, sparse_params=None):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.query_norm(attn.to_query(hidden_states).unflatten(-1, (attn.num_heads, -1)))
        key = attn.key_norm(attn.to_key(source).unflatten(-1, (attn.num_heads, -1)))
        value = attn.to_value(source).unflatten(-1, (attn.num_heads, -1))
        if rotary_emb is not None:
            query, key = ((rotary_emb * x.unflatten(-1, (-1, 1, 2))).sum(-1).flatten(-2) for x in (query, key))
        return attn.out_layer(dispatch_attention_fn(query, key, value).flatten(-2))


def build(seed: int = 0) -> Kandinsky5T2VPipeline:
    """Return the pipeline: 2 text blocks, then 3 video blocks of 2 heads; no encoders and no codec."""
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=CHANNELS,
        in_text_dim=TEXT_DIM,
        in_text_dim2=POOLED_DIM,
        time_dim=16,
        out_visual_dim=CHANNELS,
        patch_size=(1, 2, 2),
        model_dim=24,
        ff_dim=32,
        num_text_blocks=2,
        num_visual_blocks=3,
        axes_dims=(4, 4, 4),
    )
    randomise(transformer, seed)
    transformer.out_layer.out_layer.weight.mul_(0.5)
    transformer.set_attn_processor(_FloatAttnProcessor())
    pipe = Kandinsky5T2VPipeline(
        transformer=transformer,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=10.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(
    pipe: Kandinsky5T2VPipeline, *, steps: int = 4, guidance: bool = True
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the shared arguments and the per-run tensors: row 0 the clean prompt, row 1 the corrupted one.

    The pipeline writes its result into the ``latents`` it is given: pass a copy to keep them.
    """
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, FRAMES, HEIGHT, WIDTH, CHANNELS, generator=generator)
    prompts, negative = torch.randn(3, TEXT_TOKENS, TEXT_DIM, generator=generator).split((2, 1))
    pooled, negative_pooled = torch.randn(3, POOLED_DIM, generator=generator).split((2, 1))
    # Of the cumulative lengths the pipeline reads the longest difference only, so one row says it for any batch.
    lengths = torch.tensor([0, TEXT_TOKENS], dtype=torch.int32)
    shared = {
        "height": 8 * HEIGHT,
        "width": 8 * WIDTH,
        "num_frames": 4 * (FRAMES - 1) + 1,
        "num_inference_steps": steps,
        "guidance_scale": 2.0 if guidance else 1.0,
        "prompt_cu_seqlens": lengths,
        "negative_prompt_cu_seqlens": lengths,
    }
    per_run = {
        "latents": noise.repeat(2, 1, 1, 1, 1),
        "prompt_embeds_qwen": prompts,
        "prompt_embeds_clip": pooled,
        "negative_prompt_embeds_qwen": negative.repeat(2, 1, 1),
        "negative_prompt_embeds_clip": negative_pooled.repeat(2, 1),
    }
    return shared, per_run
