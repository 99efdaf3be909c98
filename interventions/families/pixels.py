"""How a family's videos become latents and back: what it takes to go from a size in pixels to a pipeline's call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch

Config = Mapping[str, Any]
Extent = tuple[int, int, int]


def ratios(config: Config) -> tuple[int, int]:
    """Return (temporal, spatial) compression from a VAE's config, where it says them."""
    return int(config["temporal_compression_ratio"]), int(config["spatial_compression_ratio"])


def wan_ratios(config: Config) -> tuple[int, int]:
    """Return (temporal, spatial) compression from the config of a VAE of Wan."""
    return int(config["scale_factor_temporal"]), int(config["scale_factor_spatial"])


def block_ratios(config: Config) -> tuple[int, int]:
    """Return (temporal, spatial) compression from a VAE's config that says the first, and has blocks that halve."""
    return int(config["temporal_compression_ratio"]), 2 ** (len(config["block_out_channels"]) - 1)


def scaling_ratios(config: Config) -> tuple[int, int]:
    """Return (temporal, spatial) compression from the config of a VAE of LTX, which may leave them to its scaling."""
    halvings = 2 ** sum(config["spatio_temporal_scaling"])
    temporal = config["temporal_compression_ratio"] or config["patch_size_t"] * halvings
    return int(temporal), int(config["spatial_compression_ratio"] or config["patch_size"] * halvings)


def float_latents(pipe: Any, noise: torch.Tensor) -> torch.Tensor:
    """Return noise as it is, for pipelines that hold their latents in float32."""
    return noise


def model_latents(pipe: Any, noise: torch.Tensor) -> torch.Tensor:
    """Return noise in the denoiser's precision, for pipelines that hand latents on as they come."""
    return noise.to(pipe.transformer.dtype)


def no_decoder(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Refuse to decode; a plan asks ``Pixels.decodes`` first."""
    raise NotImplementedError(f"{type(pipe).__name__} declares no decoder")


@torch.no_grad()
def decode_scaled(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents that were multiplied by the VAE's ``scaling_factor``."""
    return pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False)[0]


@torch.no_grad()
def decode_normalised(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents that were normalised with the VAE's mean and standard deviation, as Wan does."""
    latents = latents.to(pipe.vae.device, pipe.vae.dtype)
    shape = (1, -1, 1, 1, 1)
    # Some VAEs of the same pipeline keep their statistics in their config, others in their weights.
    home = pipe.vae.config if "latents_mean" in pipe.vae.config else pipe.vae
    mean, std = (torch.as_tensor(s).view(shape).to(latents) for s in (home.latents_mean, home.latents_std))
    # Divided by its inverse and not multiplied, for the last bit of the pipeline's own.
    inverse = 1.0 / std
    return pipe.vae.decode(latents / inverse + mean, return_dict=False)[0]


@torch.no_grad()
def decode_own(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode with the pipeline's ``decode_latents``, which takes frames before channels."""
    return pipe.decode_latents(latents.transpose(1, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """What lies between a video's size in pixels and the latents of its run.

    Attributes
    ----------
    ratios : frames and pixels of the video that a latent stands for, from the VAE's config.
    multiple : number of pixels that the pipeline wants height and width to be a multiple of.
    channels : channels of the latents, from the denoiser's config.
    size : the pipeline call's arguments for (frames, height, width) in pixels.
    only_frames : the one number of frames that the denoiser takes, from its config; None if it takes many.
    image : whether a run starts from an image, from the pipeline's config.
    latents : noise in the family's own layout to the latents that the pipeline's call takes.
    set_guidance : set a guidance scale on the pipeline, where its call takes none.
    decode : latents (rows, C, F, H, W) to videos (rows, 3, frames, y, x) in [-1, 1], as the pipeline's call does.
    """

    ratios: Callable[[Config], tuple[int, int]] = ratios
    multiple: int = 16
    channels: Callable[[Config], int] = lambda config: int(config["in_channels"])
    size: Callable[[int, int, int], dict[str, Any]] = lambda frames, height, width: {
        "num_frames": frames,
        "height": height,
        "width": width,
    }
    only_frames: Callable[[Config], int | None] = lambda config: None
    image: Callable[[Config], bool] = lambda config: False
    latents: Callable[[Any, torch.Tensor], torch.Tensor] = float_latents
    set_guidance: Callable[[Any, float], None] | None = None
    decode: Callable[[Any, torch.Tensor], torch.Tensor] = no_decoder

    @property
    def decodes(self) -> bool:
        """Whether latents can be decoded."""
        return self.decode is not no_decoder

    def extent(self, vae: Config, size: Extent) -> Extent:
        """Return the (frames, height, width) of the latents of a video of ``size`` in pixels."""
        temporal, spatial = self.ratios(vae)
        frames, height, width = size
        return (frames - 1) // temporal + 1, height // spatial, width // spatial

    def grid(self, vae: Config, patch: Extent) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Return (offset, step) for frames, height and width: legal are offset + n step from n = 1 on.

        Then frames fill whole latents and whole tokens, as ``patch`` has them, and sides whole tokens too.
        """
        temporal, spatial = self.ratios(vae)
        height, width = (lcm(self.multiple, spatial * p) for p in patch[1:])
        return (1 - temporal, temporal * patch[0]), (0, height), (0, width)
