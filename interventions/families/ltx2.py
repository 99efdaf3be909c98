"""LTX-2: video and audio denoised together, in two streams that attend to each other; the video stream is addressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from interventions.families.draw import MASKED, draw, encoded, masked_prompts, twice
from interventions.families.family import Family, Tap, UnsupportedModelError, register_family
from interventions.families.ltx import BLOCKS, packed_example, packed_extent, set_shifted_steps

# The blocks of LTX with an audio stream beside each part; they return (video, audio).
AUDIO_VIDEO_BLOCKS = replace(
    BLOCKS, taps={**BLOCKS.taps, "residual": Tap(index=0)}, beside={1: (1, "audio_hidden_states")}
)
EXTRA_CALLS = {"stg": (1.0, 0.0), "modality": (3.0, 1.0)}
"""Guidance that adds a denoiser call to a step: its default scale, and the largest at which it is off."""


def _guidance(shared: Mapping[str, Any]) -> bool:
    for name, (default, off) in EXTRA_CALLS.items():
        video = float(shared.get(f"{name}_scale", default))
        # The pipeline takes an audio scale of 0 for the video's.
        audio = float(shared.get(f"audio_{name}_scale", default) or video)
        if max(video, audio) > off:
            raise UnsupportedModelError(
                f"{name}_scale={video} and audio_{name}_scale={audio} add a denoiser call to every step, which cannot "
                f"be replayed row by row. Set both to {off}."
            )
    video = float(shared.get("guidance_scale", 3.0))
    return max(video, float(shared.get("audio_guidance_scale", 7.0) or video)) > 1


def _example(pipe: Any, steps: int, guidance: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    shared, latents = packed_example(pipe, steps)
    for name, (_, off) in {**EXTRA_CALLS, "guidance": (0.0, 3.0 if guidance else 1.0)}.items():
        shared |= {f"{name}_scale": off, f"audio_{name}_scale": off}
    connectors, audio = pipe.connectors.config, pipe.audio_vae.config
    # A prompt is as long as the connectors' registers that stand in for its padding, or a multiple of them.
    length = connectors.video_connector_num_learnable_registers or 16
    moments = round(shared["num_frames"] / 24 * audio.sample_rate / audio.mel_hop_length)
    moments = max(1, round(moments / pipe.audio_vae_temporal_compression_ratio))
    mel = audio.mel_bins // pipe.audio_vae_mel_compression_ratio
    return shared, {
        "latents": latents,
        "audio_latents": twice(draw(pipe, 7, audio.latent_channels, moments, mel)),
        **masked_prompts(pipe, length, connectors.caption_channels * connectors.text_proj_in_factor, guidance),
    }


LTX2 = register_family(
    Family(
        name="ltx2",
        title="LTX-2",
        pipelines=("LTX2Pipeline",),
        blocks=(AUDIO_VIDEO_BLOCKS,),
        conditioning=(
            "encoder_hidden_states",
            "audio_encoder_hidden_states",
            "encoder_attention_mask",
            "audio_encoder_attention_mask",
        ),
        calls={True: (("uncond", "cond"),), False: (("cond",),)},
        guidance=_guidance,
        set_steps=set_shifted_steps,
        latent_layout="packed",
        final_layout="CFHW",
        extent=packed_extent,
        patch=lambda config: (1, 1, 1),
        example=_example,
        encode=partial(encoded, names=MASKED),
        notes=(
            "Only video tokens are addressed; what video reads from audio is part of the update, the audio runs on "
            "with it. Give packed latents, and set stg_scale, modality_scale and their audio_ forms to off."
        ),
    )
)
