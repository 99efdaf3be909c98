"""Tiny random LTX-2 pipeline: video tokens, audio tokens, and attention between them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors

from tests.families._weights import normal, randomise
from tests.families.ltx import scheduler, text

CHANNELS, FRAMES, HEIGHT, WIDTH = 4, 5, 2, 3
"""Extent of the video latents; a latent pixel is a token."""
AUDIO_CHANNELS, AUDIO_LENGTH, MEL_BINS = 2, 4, 2
"""Extent of the audio latents; a moment is a token."""
CAPTION_DIM, TEXT_LAYERS = 12, 2
"""Width of the text encoder, and how many of its layers the connectors read."""


def autoencoders(seed: int) -> tuple[AutoencoderKLLTX2Video, AutoencoderKLLTX2Audio]:
    """Build tiny autoencoders; the latents that the pipeline returns are denormalised with their statistics."""
    video = AutoencoderKLLTX2Video(
        latent_channels=CHANNELS,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        patch_size_t=1,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio = AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=8,
        latent_channels=AUDIO_CHANNELS,
        mel_bins=4 * MEL_BINS,
    )
    video, audio = randomise(video, seed), randomise(audio, seed + 1)
    video.latents_mean.copy_(0.5 * normal(seed + 2, CHANNELS))
    video.latents_std.copy_(1 + 0.5 * normal(seed + 3, CHANNELS).abs())
    return video, audio


def build(seed: int = 0) -> LTX2Pipeline:
    transformer = LTX2VideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        audio_in_channels=AUDIO_CHANNELS * MEL_BINS,
        audio_out_channels=AUDIO_CHANNELS * MEL_BINS,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=CAPTION_DIM,
        rope_type="split",
    )
    connector = {"num_attention_heads": 2, "attention_head_dim": 6, "num_layers": 1, "num_learnable_registers": 2}
    connectors = LTX2TextConnectors(
        caption_channels=CAPTION_DIM,
        text_proj_in_factor=TEXT_LAYERS,
        **{f"{stream}_connector_{key}": value for stream in ("video", "audio") for key, value in connector.items()},
        rope_type="split",
    )
    vae, audio_vae = autoencoders(seed + 2)
    pipe = LTX2Pipeline(
        scheduler=scheduler(),
        vae=vae,
        audio_vae=audio_vae,
        text_encoder=None,
        tokenizer=None,
        connectors=randomise(connectors, seed + 1),
        transformer=randomise(transformer, seed),
        vocoder=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(pipe: Any, *, steps: int = 4, guidance: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    scale = 3.0 if guidance else 1.0
    shared = {
        "height": HEIGHT * pipe.vae_spatial_compression_ratio,
        "width": WIDTH * pipe.vae_spatial_compression_ratio,
        "num_frames": (FRAMES - 1) * pipe.vae_temporal_compression_ratio + 1,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "audio_guidance_scale": scale,
        "guidance_rescale": 0.0,
        "audio_guidance_rescale": 0.0,
        # Each of these two would add a denoiser call to every step.
        "stg_scale": 0.0,
        "audio_stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_modality_scale": 1.0,
    }
    per_run = {
        # Packed: latents with a frame axis would be taken for encoded video and normalised.
        "latents": normal(1, 1, FRAMES * HEIGHT * WIDTH, CHANNELS).repeat(2, 1, 1),
        "audio_latents": normal(7, 1, AUDIO_CHANNELS, AUDIO_LENGTH, MEL_BINS).repeat(2, 1, 1, 1),
        # The connectors expect prompts padded on the left.
        **{name: tensor.flip(1) for name, tensor in text(guidance, width=CAPTION_DIM * TEXT_LAYERS).items()},
    }
    return shared, per_run
