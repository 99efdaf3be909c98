"""HunyuanVideo 1.5: blocks with one stream for video and one for two prompts; guidance by a guider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from interventions.families.draw import draw, drawn_prompts, smallest, twice
from interventions.families.family import Family, UnsupportedModelError, register_family
from interventions.families.hunyuan_video import DUAL, set_even_steps, square_patch
from interventions.families.pixels import Pixels, decode_scaled

NAMES = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")


def _guider(pipe: Any) -> bool:
    guider = pipe.guider
    if type(guider).__name__ != "ClassifierFreeGuidance" or (guider._start, guider._stop) != (0.0, 1.0):
        raise UnsupportedModelError(
            f"guider {type(guider).__name__} from {guider._start} to {guider._stop} of the steps: only "
            "ClassifierFreeGuidance over all steps makes the same denoiser calls at every step. Use that"
        )
    return bool(guider._enabled and guider.num_conditions > 1)


def set_guidance(pipe: Any, scale: float) -> None:
    """Set a guidance scale on a pipeline, whose call takes none; 1 switches guidance off."""
    if scale > 1:
        pipe.guider.guidance_scale = scale
    (pipe.guider.enable if scale > 1 else pipe.guider.disable)()


def _example(pipe: Any, steps: int, guidance: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    set_guidance(pipe, max(float(pipe.guider.guidance_scale), 1.5) if guidance else 1.0)
    config, strides = pipe.transformer.config, (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial)
    shared, extent = smallest(square_patch(config), strides, steps, guidance)
    del shared["guidance_scale"]
    per_run = {"latents": twice(draw(pipe, 1, pipe.num_channels_latents, *extent))}
    for suffix, width in (("", config.text_embed_dim), ("_2", config.text_embed_2_dim)):
        for name, embeds in drawn_prompts(pipe, 16, width, guidance).items():
            per_run |= {f"{name}{suffix}": embeds, f"{name}_mask{suffix}": embeds.new_ones(embeds.shape[:2])}
    return shared, per_run


@torch.no_grad()
def _encode(pipe: Any, prompts: Sequence[str], guided: bool, negative: str | None = None) -> dict[str, torch.Tensor]:
    options = {"dtype": pipe.transformer.dtype, "batch_size": len(prompts)}
    encoded = dict(zip(NAMES, pipe.encode_prompt(list(prompts), **options), strict=True))
    if guided:
        uncond = pipe.encode_prompt([negative or ""] * len(prompts), **options)
        encoded |= {f"negative_{name}": tensor for name, tensor in zip(NAMES, uncond, strict=True)}
    return encoded


HUNYUAN_VIDEO15 = register_family(
    Family(
        name="hunyuan_video15",
        title="HunyuanVideo 1.5 T2V",
        pipelines=("HunyuanVideo15Pipeline",),
        blocks=(DUAL,),
        conditioning=(
            "encoder_hidden_states",
            "encoder_attention_mask",
            "encoder_hidden_states_2",
            "encoder_attention_mask_2",
        ),
        guider=_guider,
        guided=lambda scale: {},
        set_steps=set_even_steps,
        patch=square_patch,
        example=_example,
        encode=_encode,
        pixels=Pixels(
            channels=lambda config: int(config["out_channels"]), set_guidance=set_guidance, decode=decode_scaled
        ),
        notes=(
            "The guidance scale is the guider's, as the call takes none. Text tokens that count come first, so where a "
            "token lies depends on its prompt's masks; those that leave the last block are not used."
        ),
    )
)
