"""Mochi 1: joint attention over video and ragged text, whose last block drops the text; guidance in one call."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from interventions.families.draw import MASKED, draw, encoded, masked_prompts, smallest, twice
from interventions.families.family import Attention, Blocks, Config, Family, Tap, register_family
from interventions.families.pixels import Pixels
from interventions.solvers import UnsupportedSolverError

BLOCKS = Blocks(
    path="transformer_blocks",
    at=slice(None, -1),
    taps={
        "attn1.heads": Tap(path="attn1.to_out.0", end="input"),
        "attn1": Tap(path="attn1", index=0),
        "attn1.text": Tap(path="attn1", index=1),
        "ffn": Tap(path="ff"),
        "ffn.text": Tap(path="ff_context"),
        "residual": Tap(index=0),
        "residual.text": Tap(index=1),
    },
    attention={"attn1": Attention(path="attn1", order="video_text")},
)
# It reads the text and returns it as it came.
LAST = replace(
    BLOCKS,
    at=slice(-1, None),
    taps={key: tap for key, tap in BLOCKS.taps.items() if not key.endswith(".text")},
)


def _set_steps(scheduler: Any, steps: int, latent_shape: tuple[int, int, int]) -> None:
    # A pipeline's module is slow to load, and only Mochi needs this one.
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

    if steps < 2:
        raise UnsupportedSolverError(f"Mochi's schedule has a slow and a fast half: use 2 or more steps, not {steps}")
    scheduler.set_timesteps(sigmas=linear_quadratic_schedule(steps, 0.025))


def _patch(config: Config) -> tuple[int, int, int]:
    return 1, config["patch_size"], config["patch_size"]


@torch.no_grad()
def _decode(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    config = pipe.vae.config
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (
            torch.tensor(s).view(1, -1, 1, 1, 1).to(latents) for s in (config.latents_mean, config.latents_std)
        )
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor
    return pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]


def _example(pipe: Any, steps: int, guidance: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config, strides = pipe.transformer.config, (pipe.vae_temporal_scale_factor, pipe.vae_spatial_scale_factor)
    shared, extent = smallest(_patch(config), strides, steps, guidance)
    latents = twice(draw(pipe, 1, config.in_channels, *extent))
    prompts = masked_prompts(pipe, 16, config.text_embed_dim, guidance)
    masks = {name: tensor.bool() for name, tensor in prompts.items() if name.endswith("mask")}
    return shared, {"latents": latents, **prompts, **masks}


MOCHI = register_family(
    Family(
        name="mochi",
        title="Mochi 1",
        pipelines=("MochiPipeline",),
        blocks=(BLOCKS, LAST),
        conditioning=("encoder_hidden_states", "encoder_attention_mask"),
        calls={True: (("uncond", "cond"),), False: (("cond",),)},
        set_steps=_set_steps,
        patch=_patch,
        example=_example,
        encode=partial(encoded, names=MASKED),
        # Of the pipeline's own, which does not ask its VAE.
        pixels=Pixels(ratios=lambda config: (6, 8), multiple=8, decode=_decode),
        notes=(
            "A block adds attn1 and ffn after an RMS norm, so their scale has no effect. The prompt also reaches every "
            "block through its time embedding."
        ),
    )
)
