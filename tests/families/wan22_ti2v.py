"""Tiny random Wan 2.2 TI2V-5B image-to-video pipeline: clean first frame, a timestep for every token."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline

from tests.families import wan
from tests.families._weights import normal, randomise


def autoencoder(seed: int) -> AutoencoderKLWan:
    """Build a tiny autoencoder with the published strides: 8 in space, 4 in time."""
    channels = wan.LATENT_SHAPE[0]
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
    return randomise(vae, seed)


def image(pipe: Any) -> torch.Tensor:
    """Return the first frame, (1, 3, height, width) in [0, 1]."""
    _, _, height, width = wan.LATENT_SHAPE
    scale = pipe.vae_scale_factor_spatial
    return normal(5, 1, 3, height * scale, width * scale).sigmoid()


def build(seed: int = 0) -> WanImageToVideoPipeline:
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder(seed + 2),
        scheduler=wan.scheduler(5.0),
        transformer=wan.transformer(seed),
        expand_timesteps=True,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(pipe: Any, *, steps: int = 4, guidance: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    shared, per_run = wan.arguments(pipe, steps=steps, guidance=guidance)
    return {**shared, "image": image(pipe)}, per_run
