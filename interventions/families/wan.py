"""Wan: text-to-video, and image-to-video in the form that gives the first latent frame clean (TI2V)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interventions.families.family import Family, register_family
from interventions.sites import Branch


def _given_frames(pipeline_config: Mapping[str, Any]) -> int:
    image_to_video = pipeline_config.get("_class_name") == "WanImageToVideoPipeline"
    return 1 if image_to_video and pipeline_config.get("expand_timesteps") else 0


def _branches(guidance_scale: float) -> tuple[Branch, ...]:
    return ("cond", "uncond") if guidance_scale > 1 else ("cond",)


WAN = register_family(
    Family(
        name="wan",
        pipelines=("WanPipeline", "WanImageToVideoPipeline"),
        denoiser="transformer",
        blocks="blocks",
        submodules={"attn1": "attn1", "attn2": "attn2", "ffn": "ffn"},
        given_frames=_given_frames,
        branches=_branches,
    )
)
