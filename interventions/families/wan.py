"""Wan 2.1 and 2.2: text-to-video and image-to-video, one denoiser or two experts, and the forms made of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image

from interventions.families.draw import FRAMES, HEIGHT, PLAIN, WIDTH, draw, drawn_prompts, encoded, twice
from interventions.families.family import Attention, Blocks, Config, Family, Tap, register_family
from interventions.families.pixels import Pixels, decode_normalised, wan_ratios

BLOCKS = Blocks(
    path="blocks",
    taps={
        "attn1.heads": Tap(path="attn1.to_out.0", end="input"),
        "attn1": Tap(path="attn1"),
        "attn2.heads": Tap(path="attn2.to_out.0", end="input"),
        "attn2": Tap(path="attn2"),
        "ffn": Tap(path="ffn"),
        "residual": Tap(),
    },
    attention={"attn1": Attention(path="attn1", order="video"), "attn2": Attention(path="attn2", order="cross")},
    along=((1, "encoder_hidden_states"), (2, "temb")),
)


def _given_frames(pipeline_config: Config) -> int:
    image_to_video = pipeline_config.get("_class_name") == "WanImageToVideoPipeline"
    return 1 if image_to_video and pipeline_config.get("expand_timesteps") else 0


def _denoiser_at(pipeline_config: Config, timesteps: Sequence[float]) -> tuple[int, ...]:
    boundary = pipeline_config.get("boundary_ratio")
    # The pipelines compare with boundary_ratio * num_train_timesteps, which every Wan scheduler sets to 1000.
    return tuple(0 if boundary is None or t >= 1000 * boundary else 1 for t in timesteps)


def _example(pipe: Any, steps: int, guidance: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = pipe.transformer.config
    frames, height, width = (n * p for n, p in zip((FRAMES, HEIGHT, WIDTH), config.patch_size, strict=True))
    shared: dict[str, Any] = {
        "height": height * pipe.vae_scale_factor_spatial,
        "width": width * pipe.vae_scale_factor_spatial,
        "num_frames": (frames - 1) * pipe.vae_scale_factor_temporal + 1,
        "num_inference_steps": steps,
        "guidance_scale": 3.0 if guidance else 1.0,
    }
    if type(pipe).__name__ == "WanImageToVideoPipeline":
        pixels = draw(pipe, 5, shared["height"], shared["width"], 3).sigmoid() * 255
        shared["image"] = Image.fromarray(pixels.to("cpu", torch.uint8).numpy())
    # With image tokens, the attention processor takes the last 512 tokens for text.
    length = 512 if config.image_dim is not None else 16
    latents = twice(draw(pipe, 1, config.out_channels, frames, height, width))
    return shared, {"latents": latents, **drawn_prompts(pipe, length, config.text_dim, guidance)}


PIXELS = Pixels(
    ratios=wan_ratios,
    channels=lambda config: int(config["out_channels"]),
    image=lambda config: config.get("_class_name") == "WanImageToVideoPipeline",
    decode=decode_normalised,
)
WAN = register_family(
    Family(
        name="wan",
        title="Wan 2.1 T2V and I2V, Wan 2.2 A14B (two experts) and TI2V-5B",
        pipelines=("WanPipeline", "WanImageToVideoPipeline"),
        denoisers=("transformer", "transformer_2"),
        denoiser_at=_denoiser_at,
        blocks=(BLOCKS,),
        conditioning=("encoder_hidden_states", "encoder_hidden_states_image"),
        # With expand_timesteps a row has an embedding and six modulations for every token, and all rows the same.
        once=("timestep",),
        given_frames=_given_frames,
        example=_example,
        # What the pipelines' own call asks for; the default of encode_prompt is shorter.
        encode=partial(encoded, names=PLAIN, max_sequence_length=512),
        pixels=PIXELS,
        notes=(
            "The image of image-to-video is shared by all runs. In Wan 2.1 attn2 reads tokens of the image beside the "
            "text's, and a knock-out of text leaves them."
        ),
    )
)
