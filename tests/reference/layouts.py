"""Where things are in the modules of each family: a table of its own, apart from the adapters that it checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Spot:
    """One tensor inside a block.

    Attributes
    ----------
    path : module inside the block, empty for the block itself. entering : its first input instead of its output.
    index : position in a tuple. joint : both streams in one sequence, "video" or "text" first; None for one stream.
    half : number of the channel group that is meant, of two that lie side by side ("a" the first ``width`` channels).
    grid : whether tokens come as (frames, height, width).
    """

    path: str = ""
    entering: bool = False
    index: int | None = None
    joint: str | None = None
    half: str | None = None
    grid: bool = False


@dataclass(frozen=True)
class Blocks:
    """One list of blocks.

    Attributes
    ----------
    path : the list in the denoiser. spots : tensors by component, stream and "heads"; "block" is what it gives.
    attention : module and kind of each softmax attention: video, video_text, text_video or cross.
    fold : what shares the batch axis with the rows: "frames", "places" or nothing.
    takes : position and name of the arguments that the block's outputs take the place of, in the order of its outputs:
        video tokens, and text or audio tokens where they run through the blocks as well.
    """

    path: str
    spots: Mapping[str, Spot]
    attention: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    fold: str = ""
    takes: Mapping[str, tuple[int, str]] = field(default_factory=lambda: {"video": (0, "hidden_states")})


@dataclass(frozen=True)
class Layout:
    """One family under guidance.

    Attributes
    ----------
    blocks : lists in the order in which they run; ``turns`` if they take turns.
    calls : guidance branches of each denoiser call of a step, in the order of its rows.
    prompt : arguments of the denoiser that carry the prompt. axes : of a row of latents, "S" for packed tokens.
    returned : axes of what the pipeline returns. patch : latents that a token covers, from the denoiser's config.
    entry : factor between the latents given and those that enter the first step, from the scheduler.
    cross_keys : number of text keys where an attention also reads keys of an image in a call of its own.
    """

    blocks: tuple[Blocks, ...]
    calls: tuple[tuple[str, ...], ...] = (("cond",), ("uncond",))
    prompt: tuple[str, ...] = ("encoder_hidden_states",)
    denoisers: tuple[str, ...] = ("transformer",)
    turns: bool = False
    axes: str = "CFHW"
    returned: str | None = None
    patch: Callable[[Any], tuple[int, int, int]] = lambda config: tuple(config.patch_size)
    entry: Callable[[Any], float] = lambda scheduler: 1.0
    given: int = 0
    cross_keys: int | None = None

    def rows(self, latents: torch.Tensor, shared: Mapping[str, Any], axes: str | None = None) -> torch.Tensor:
        """View latents of a loop as (rows, C, F, H, W)."""
        axes = axes or self.axes
        if axes == "SC":
            frames, height = (shared["num_frames"] - 1) // 8 + 1, shared["height"] // 32
            latents, axes = latents.reshape(len(latents), frames, height, -1, latents.shape[-1]), "FHWC"
        return latents.permute(0, *(1 + axes.index(a) for a in "CFHW"))

    def packed(self, latents: torch.Tensor) -> torch.Tensor:
        """Undo ``rows``."""
        axes = "FHWC" if self.axes == "SC" else self.axes
        latents = latents.permute(0, *(1 + "CFHW".index(a) for a in axes))
        return latents.flatten(1, 3) if self.axes == "SC" else latents


ONE_CALL = (("uncond", "cond"),)
BOTH = {"video": (0, "hidden_states"), "text": (1, "encoder_hidden_states")}
MASKED = ("encoder_hidden_states", "encoder_attention_mask")


def _crossing(ff: str, path: str, **more: Any) -> Blocks:
    """Return blocks with self-attention, cross-attention to text and a feed-forward, each giving one tensor."""
    spots = {
        "attn1.heads": Spot("attn1.to_out.0", entering=True),
        "attn1": Spot("attn1"),
        "attn2.heads": Spot("attn2.to_out.0", entering=True),
        "attn2": Spot("attn2"),
        "ffn": Spot(ff),
        "block": Spot(),
    }
    spots |= more.pop("spots", {})
    attention = more.pop("attention", {"attn1": ("attn1", "video"), "attn2": ("attn2", "cross")})
    return Blocks(path, spots, attention, **more)


def _joint(attention: str, order: str = "video_text") -> Blocks:
    """Return blocks with one stream for video and one for text, and joint attention between them."""
    spots = {
        "attn1.heads": Spot(f"{attention}.to_out.0", entering=True),
        "attn1": Spot(attention, index=0),
        "attn1.text": Spot(attention, index=1),
        "ffn": Spot("ff"),
        "ffn.text": Spot("ff_context"),
        "block": Spot(index=0),
        "block.text": Spot(index=1),
    }
    return Blocks("transformer_blocks", spots, {"attn1": (attention, order)}, takes=BOTH)


def _square(config: Any) -> tuple[int, int, int]:
    temporal = getattr(config, "patch_size_t", None)
    return temporal or 1, config.patch_size, config.patch_size


def _pixel(config: Any) -> tuple[int, int, int]:
    return 1, 1, 1


# What enters the shared output projection of a single-stream block is attention beside MLP, video tokens first.
_INTO = {"path": "proj_out", "entering": True, "joint": "video"}
HUNYUAN_SINGLE = Blocks(
    "single_transformer_blocks",
    {
        "attn1.heads": Spot(**_INTO, half="a"),
        "attn1": Spot(**_INTO, half="a"),
        "attn1.text": Spot(**_INTO, half="a"),
        "ffn": Spot(**_INTO, half="b"),
        "ffn.text": Spot(**_INTO, half="b"),
        "block": Spot(index=0),
        "block.text": Spot(index=1),
    },
    {"attn1": ("attn", "video_text")},
    takes=BOTH,
)
COGVIDEOX = Blocks(
    "transformer_blocks",
    {
        "attn1.heads": Spot("attn1.to_out.0", entering=True, joint="text"),
        "attn1": Spot("attn1", index=0),
        "attn1.text": Spot("attn1", index=1),
        "ffn": Spot("ff", joint="text"),
        "ffn.text": Spot("ff", joint="text"),
        "block": Spot(index=0),
        "block.text": Spot(index=1),
    },
    {"attn1": ("attn1", "text_video")},
    takes=BOTH,
)
KANDINSKY_TEXT = Blocks(
    "text_transformer_blocks",
    {"attn1.text": Spot("self_attention"), "ffn.text": Spot("feed_forward"), "block.text": Spot()},
    takes={"text": (0, "text_embed")},
)
KANDINSKY_VIDEO = Blocks(
    "visual_transformer_blocks",
    {
        "attn1.heads": Spot("self_attention.out_layer", entering=True),
        "attn1": Spot("self_attention"),
        "attn2.heads": Spot("cross_attention.out_layer", entering=True),
        "attn2": Spot("cross_attention"),
        "ffn": Spot("feed_forward"),
        "block": Spot(),
    },
    {"attn1": ("self_attention", "video"), "attn2": ("cross_attention", "cross")},
    takes={"video": (0, "visual_embed")},
)
LATTE_SPATIAL = _crossing("ff", "transformer_blocks", fold="frames", attention={"attn2": ("attn2", "cross")})
LATTE_TEMPORAL = Blocks(
    "temporal_transformer_blocks",
    {k: s for k, s in LATTE_SPATIAL.spots.items() if not k.startswith("attn2")},
    {"attn1": ("attn1", "video")},
    fold="places",
)

_WAN = _crossing("ffn", "blocks")
_LTX = _crossing("ff", "transformer_blocks")
LAYOUTS: dict[str, Layout] = {
    "wan": Layout((_WAN,)),
    "wan22_a14b": Layout((_WAN,), denoisers=("transformer", "transformer_2")),
    "wan22_ti2v": Layout((_WAN,), given=1),
    "wan_i2v21": Layout((_WAN,), cross_keys=512),
    "skyreels_v2": Layout((_WAN,)),
    "ltx": Layout((_LTX,), ONE_CALL, MASKED, axes="SC", patch=_pixel),
    "ltx2": Layout(
        (
            _crossing(
                "ff",
                "transformer_blocks",
                spots={"block": Spot(index=0)},
                takes={"video": (0, "hidden_states"), "audio": (1, "audio_hidden_states")},
            ),
        ),
        ONE_CALL,
        (*MASKED, *(f"audio_{name}" for name in MASKED)),
        axes="SC",
        returned="CFHW",
        patch=_pixel,
    ),
    "cogvideox": Layout((COGVIDEOX,), ONE_CALL, axes="FCHW", patch=_square),
    "hunyuan_video": Layout((_joint("attn"), HUNYUAN_SINGLE), prompt=(*MASKED, "pooled_projections"), patch=_square),
    "hunyuan_video15": Layout(
        (_joint("attn"),),
        prompt=(*MASKED, *(f"{name}_2" for name in MASKED)),
        patch=_square,
    ),
    "mochi": Layout((_joint("attn1"),), ONE_CALL, MASKED, patch=_square),
    "allegro": Layout(
        (_LTX,), ONE_CALL, MASKED, patch=_square, entry=lambda scheduler: float(scheduler.init_noise_sigma)
    ),
    "sana_video": Layout(
        (
            _crossing(
                "ff",
                "transformer_blocks",
                spots={"ffn": Spot("ff", grid=True)},
                attention={"attn2": ("attn2", "cross")},
            ),
        ),
        ONE_CALL,
        MASKED,
    ),
    "kandinsky5": Layout(
        (KANDINSKY_TEXT, KANDINSKY_VIDEO), prompt=("encoder_hidden_states", "pooled_projections"), axes="FHWC"
    ),
    "cosmos": Layout((_LTX,), entry=lambda scheduler: float(scheduler.config.sigma_max)),
    "latte": Layout((LATTE_SPATIAL, LATTE_TEMPORAL), ONE_CALL, turns=True, patch=_square),
}
