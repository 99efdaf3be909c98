"""Tiny random Wan 2.2 A14B text-to-video pipeline: one expert above the boundary, another below."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanPipeline

from tests.families import wan


def build(seed: int = 0) -> WanPipeline:
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=wan.scheduler(3.0),
        transformer=wan.transformer(seed),
        transformer_2=wan.transformer(seed + 1),
        boundary_ratio=0.875,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(pipe: Any, *, steps: int = 4, guidance: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    shared, per_run = wan.arguments(pipe, steps=steps, guidance=guidance)
    return {**shared, "guidance_scale": 4.0 if guidance else 1.0, "guidance_scale_2": 3.0 if guidance else 1.0}, per_run
