"""Assemble the embedded maze pipeline from nothing: a real Wan transformer, T5 encoder, tokenizer and codec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.embedded.codec import GridCodec

PROMPTS = ("red", "blue", "any")
MAX_PROMPT_TOKENS = 4
TRAIN_SHIFT = 5.0
"""Shift of the flow-matching schedule: a cell is four equal latent pixels, so decisions fall at high sigma."""
LATENTS_MEAN = (0.36, 0.35, 0.24)
LATENTS_STD = (0.81, 0.77, 0.79)
"""Mean and standard deviation of pixels in [-1, 1] over solution videos."""

TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 256,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def build_tokenizer() -> Any:
    """Build the word-level tokenizer of the three prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{word: i + 3 for i, word in enumerate(PROMPTS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_PROMPT_TOKENS,
    )


def build_text_encoder(seed: int) -> Any:
    """Build a one-layer T5 encoder; its random features tell the prompts apart and are never trained."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=8,
        d_model=TRANSFORMER_CONFIG["text_dim"],
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config).eval().requires_grad_(False)


def build_pipeline(seed: int, **transformer_overrides: Any) -> Any:
    """Build a ``WanImageToVideoPipeline`` in TI2V form (clean first frame, per-token timesteps) with random weights.

    Parameters
    ----------
    seed : seeds the weights of text encoder and transformer.
    transformer_overrides : replace entries of ``TRANSFORMER_CONFIG``.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel

    text_encoder = build_text_encoder(seed)
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(**{**TRANSFORMER_CONFIG, **transformer_overrides})
    return WanImageToVideoPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder,
        vae=GridCodec(latents_mean=LATENTS_MEAN, latents_std=LATENTS_STD),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=TRAIN_SHIFT),
        transformer=transformer.eval(),
        expand_timesteps=True,
    )


def encode_prompts(pipe: Any, prompts: list[str]) -> torch.Tensor:
    """Encode prompts with the pipeline's own ``encode_prompt``: (len(prompts), MAX_PROMPT_TOKENS, text_dim)."""
    embeds, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_PROMPT_TOKENS, device=torch.device("cpu")
    )
    return embeds


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Save as a diffusers folder (safetensors) that ``DiffusionPipeline.from_pretrained`` loads."""
    pipe.save_pretrained(folder, safe_serialization=True)
