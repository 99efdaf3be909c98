"""Tiny checkpoints on disk: the random pipelines of this folder with an encoder for a few words and an autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    FlowMatchEulerDiscreteScheduler,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tests.families import cogvideox, ltx, wan, wan22_a14b, wan22_ti2v
from tests.families._weights import randomise

WORDS = ("a", "red", "blue", "ball", "cube", "rolls", "falls", "left", "right", "blurry")
FRAMES = {"wan": 17, "wan_euler": 17, "a14b": 17, "ti2v": 17, "ltx": 33, "cogvideox": 17}
"""Pixel frames of five latent ones."""
SIZES = {"ltx": (64, 96)}
"""Height and width where they are not those of ``SIZE``."""
SIZE = (32, 48)


def tokenizer(length: int) -> Any:
    """Build a tokenizer of whole words."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{word: i + 3 for i, word in enumerate(WORDS)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def text_encoder(width: int, seed: int = 7) -> Any:
    """Build a one-layer T5 encoder."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=16,
        d_model=width,
        d_kv=6,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    encoder = T5EncoderModel(config).eval().requires_grad_(False)
    # Few of many tokens are words, so what they say has to be loud.
    encoder.encoder.final_layer_norm.weight *= 8
    return encoder


def ltx_autoencoder(seed: int) -> Any:
    """Build a tiny autoencoder with the published strides: 32 in space, 8 in time."""
    vae = AutoencoderKLLTXVideo(
        latent_channels=ltx.CHANNELS,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    vae = randomise(vae, seed)
    vae.latents_mean, vae.latents_std = torch.linspace(-0.5, 0.5, ltx.CHANNELS), torch.linspace(0.5, 2.0, ltx.CHANNELS)
    return vae


def cogvideox_autoencoder(seed: int) -> Any:
    """Build a tiny autoencoder with the published strides: 8 in space, 4 in time."""
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=cogvideox.CHANNELS, layers_per_block=1, norm_num_groups=2
    )
    return randomise(vae, seed)


def autoencoder(name: str, seed: int = 3) -> Any:
    """Build the tiny autoencoder of a family that is built without one."""
    if name in ("skyreels_v2", "sana_video"):
        return wan22_ti2v.autoencoder(seed)
    if name in ("hunyuan_video", "kandinsky5"):
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
        )
    elif name == "mochi":
        vae = AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            latent_channels=4,
            layers_per_block=(1, 1, 1, 1, 1),
            latents_mean=None,
            latents_std=None,
            scaling_factor=0.7,
        )
    else:
        vae = AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=2,
        )
    return randomise(vae, seed)


def build(name: str) -> Any:
    """Build a whole tiny pipeline."""
    length, width = 16, wan.TEXT_DIM
    if name == "ltx":
        pipe, vae = ltx.build(), ltx_autoencoder(3)
    elif name == "cogvideox":
        pipe, vae, length = cogvideox.build(), cogvideox_autoencoder(3), cogvideox.TEXT_LENGTH
    else:
        pipe = {"a14b": wan22_a14b, "ti2v": wan22_ti2v}.get(name, wan).build()
        vae = wan22_ti2v.autoencoder(3)
        channels = wan.LATENT_SHAPE[0]
        vae.register_to_config(latents_mean=[0.1 * c for c in range(channels)], latents_std=[1.5] * channels)
    if name == "wan_euler":
        pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.register_modules(tokenizer=tokenizer(length), text_encoder=text_encoder(width), vae=vae)
    return pipe


def save(name: str, folder: Path) -> Path:
    """Save a tiny checkpoint as ``from_pretrained`` expects it."""
    build(name).save_pretrained(folder, safe_serialization=True)
    return folder
