"""CogVideoX: text and video tokens in one sequence, text first; latents with frames before channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from interventions.families.draw import FRAMES, HEIGHT, PLAIN, WIDTH, draw, drawn_prompts, encoded, twice
from interventions.families.family import Attention, Blocks, Config, Family, Tap, register_family
from interventions.families.pixels import Pixels, block_ratios, decode_own, model_latents

BLOCKS = Blocks(
    path="transformer_blocks",
    taps={
        "attn1.heads": Tap(path="attn1.to_out.0", end="input", part="last"),
        "attn1": Tap(path="attn1", index=0),
        "attn1.text": Tap(path="attn1", index=1),
        "ffn": Tap(path="ff", part="last"),
        "ffn.text": Tap(path="ff", part="first"),
        "residual": Tap(index=0),
        "residual.text": Tap(index=1),
    },
    attention={"attn1": Attention(path="attn1", order="text_video")},
)


def _patch(config: Config) -> tuple[int, int, int]:
    return config["patch_size_t"] or 1, config["patch_size"], config["patch_size"]


def _example(pipe: Any, steps: int, guidance: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = pipe.transformer.config
    frames, height, width = (n * p for n, p in zip((FRAMES, HEIGHT, WIDTH), _patch(config), strict=True))
    shared = {
        "height": height * pipe.vae_scale_factor_spatial,
        "width": width * pipe.vae_scale_factor_spatial,
        "num_frames": (frames - 1) * pipe.vae_scale_factor_temporal + 1,
        "num_inference_steps": steps,
        "guidance_scale": 3.0 if guidance else 1.0,
    }
    # Positional embeddings that are added rather than rotated fix the length of the text.
    prompts = drawn_prompts(pipe, config.max_text_seq_length, config.text_embed_dim, guidance)
    latents = twice(draw(pipe, 1, frames, config.in_channels, height, width))
    return shared, {"latents": latents.to(pipe.transformer.dtype), **prompts}


def _encode(pipe: Any, prompts: Sequence[str], guided: bool, negative: str | None = None) -> dict[str, torch.Tensor]:
    length = pipe.transformer.config.max_text_seq_length
    return encoded(pipe, prompts, guided, negative, names=PLAIN, max_sequence_length=length)


COGVIDEOX = register_family(
    Family(
        name="cogvideox",
        title="CogVideoX 2B and 5B, CogVideoX 1.5",
        pipelines=("CogVideoXPipeline",),
        blocks=(BLOCKS,),
        calls={True: (("uncond", "cond"),), False: (("cond",),)},
        latent_layout="FCHW",
        patch=_patch,
        example=_example,
        encode=_encode,
        pixels=Pixels(ratios=block_ratios, multiple=8, latents=model_latents, decode=decode_own),
        notes="Text tokens run through every block beside the video; those that leave the last block are not used.",
    )
)
