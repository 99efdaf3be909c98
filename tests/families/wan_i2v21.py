"""Tiny random Wan 2.1 image-to-video pipeline: condition channels beside the latents, image tokens beside the text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests.families import wan
from tests.families._weights import randomise
from tests.families.wan22_ti2v import autoencoder, image

IMAGE_DIM, IMAGE_SIZE = 8, 4
TEXT_LENGTH = 512
"""Fixed by the attention processor, which takes the last 512 context tokens as text."""


def image_encoder(seed: int) -> CLIPVisionModel:
    """Build a CLIP vision model with 5 tokens."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=2,
    )
    return randomise(CLIPVisionModel(config), seed)


def build(seed: int = 0) -> WanImageToVideoPipeline:
    channels = wan.LATENT_SHAPE[0]
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder(seed + 2),
        scheduler=wan.scheduler(3.0),
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        image_encoder=image_encoder(seed + 3),
        # Latents, the encoded condition and a mask of 4 pixel frames for each latent frame.
        transformer=wan.transformer(seed, in_channels=2 * channels + 4, image_dim=IMAGE_DIM, added_kv_proj_dim=24),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(pipe: Any, *, steps: int = 4, guidance: bool = True) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    shared, per_run = wan.arguments(pipe, steps=steps, guidance=guidance, text_length=TEXT_LENGTH)
    pixels = (image(pipe)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    return {**shared, "image": Image.fromarray(pixels)}, per_run
