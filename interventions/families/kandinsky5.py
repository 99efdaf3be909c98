"""Kandinsky 5 text-to-video: blocks of text alone, then blocks of video that read it; latents with channels last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from interventions.families.draw import draw, drawn_prompts, smallest, twice
from interventions.families.family import Attention, Blocks, Config, Family, Tap, UnsupportedModelError, register_family
from interventions.families.pixels import Pixels, decode_scaled

TEXT_BLOCKS = Blocks(
    path="text_transformer_blocks",
    count="num_text_blocks",
    taps={"attn1.text": Tap(path="self_attention"), "ffn.text": Tap(path="feed_forward"), "residual.text": Tap()},
    text_input=(0, "text_embed"),
)
VIDEO_BLOCKS = Blocks(
    path="visual_transformer_blocks",
    count="num_visual_blocks",
    taps={
        "attn1.heads": Tap(path="self_attention.out_layer", end="input"),
        "attn1": Tap(path="self_attention"),
        "attn2.heads": Tap(path="cross_attention.out_layer", end="input"),
        "attn2": Tap(path="cross_attention"),
        "ffn": Tap(path="feed_forward"),
        "residual": Tap(),
    },
    attention={
        "attn1": Attention(path="self_attention", order="video"),
        "attn2": Attention(path="cross_attention", order="cross"),
    },
    video_input=(0, "visual_embed"),
)
NEGATIVE = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, walking "
    "backwards"
)
"""What the pipeline's own call takes for a negative prompt if it is given none."""


def _patch(config: Config) -> tuple[int, int, int]:
    if config.get("attention_type") == "nabla":
        raise UnsupportedModelError(
            "attention_type 'nabla' orders the tokens of a frame in blocks and attends to some of them only. Use a "
            "checkpoint with 'regular' attention, such as those for 5 seconds"
        )
    frames, height, width = config["patch_size"]
    return frames, height, width


def _latents(pipe: Any, noise: torch.Tensor) -> torch.Tensor:
    config, noise = pipe.transformer.config, noise.to(pipe.transformer.dtype)
    if config.visual_cond:
        # Behind the latents the pipeline wants those of an image and their mask, all zero in text-to-video.
        noise = torch.cat([noise, noise.new_zeros(*noise.shape[:-1], config.in_visual_dim + 1)], dim=-1)
    return noise


def _example(pipe: Any, steps: int, guidance: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config, strides = pipe.transformer.config, (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial)
    shared, extent = smallest(_patch(config), strides, steps, guidance)
    latents = _latents(pipe, twice(draw(pipe, 1, *extent, config.in_visual_dim)))
    prompts = drawn_prompts(pipe, 16, config.in_text_dim, guidance)
    pooled = drawn_prompts(pipe, 1, config.in_text_dim2, guidance)
    per_run = {"latents": latents}
    for name in prompts:
        per_run |= _rows(name.removesuffix("prompt_embeds"), prompts[name], pooled[name][:, 0])
    return shared, per_run


@torch.no_grad()
def _encode(pipe: Any, prompts: Sequence[str], guided: bool, negative: str | None = None) -> dict[str, torch.Tensor]:
    named: dict[str, torch.Tensor] = {}
    uncond = [NEGATIVE if negative is None else negative] * len(prompts)
    for prefix, texts in {"": list(prompts), "negative_": uncond}.items():
        if not prefix or guided:
            embeds, pooled, _ = pipe.encode_prompt(texts, dtype=pipe.transformer.dtype)
            named |= _rows(prefix, embeds, pooled)
    return named


def _rows(prefix: str, embeds: torch.Tensor, pooled: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name embeddings (rows, tokens, channels) and pooled ones (rows, channels) as the call does.

    Of the cumulative lengths it wants it only reads the longest difference, so they can be said row by row.
    """
    lengths = torch.tensor([[0, embeds.shape[1]]], dtype=torch.int32, device=embeds.device)
    return {
        f"{prefix}prompt_embeds_qwen": embeds,
        f"{prefix}prompt_embeds_clip": pooled,
        f"{prefix}prompt_cu_seqlens": lengths.repeat(len(embeds), 1),
    }


KANDINSKY5 = register_family(
    Family(
        name="kandinsky5",
        title="Kandinsky 5 T2V, with regular attention",
        pipelines=("Kandinsky5T2VPipeline",),
        blocks=(TEXT_BLOCKS, VIDEO_BLOCKS),
        conditioning=("encoder_hidden_states", "pooled_projections"),
        latent_layout="FHWC",
        patch=_patch,
        heads=lambda config: int(config["model_dim"]) // sum(config["axes_dims"]),
        example=_example,
        encode=_encode,
        pixels=Pixels(channels=lambda config: int(config["in_visual_dim"]), latents=_latents, decode=decode_scaled),
        notes=(
            "The first blocks hold text alone (`stream: text`), the others video alone, with text by cross-attention. "
            "Attention rounds queries and keys to bfloat16 even in float32."
        ),
    )
)
