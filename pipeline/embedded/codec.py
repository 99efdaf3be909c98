"""The embedded model's stand-in for a VAE: average pooling in, repetition out, no parameters to learn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch.nn import functional as F


class GridCodec(ModelMixin, ConfigMixin):
    """Encode pixels in [-1, 1] to a grid of colours and back.

    A latent pixel is the mean colour of ``scale_factor_spatial`` squared pixels; one latent frame stands for
    ``scale_factor_temporal`` frames (the first one for a single frame), as in the Wan VAE. ``latents_mean`` and
    ``latents_std`` are the statistics that the diffusers pipeline applies around ``encode`` and ``decode``.
    """

    @register_to_config
    def __init__(
        self,
        z_dim: int = 3,
        scale_factor_spatial: int = 8,
        scale_factor_temporal: int = 4,
        latents_mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        latents_std: tuple[float, ...] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        # ModelMixin reads device and dtype off the parameters, and safetensors refuses an empty file.
        self.anchor = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def encode(self, video: torch.Tensor) -> SimpleNamespace:
        """Encode (batch, 3, frames, height, width) to latents (batch, 3, latent frames, h, w)."""
        s, t = self.config.scale_factor_spatial, self.config.scale_factor_temporal
        return SimpleNamespace(latents=F.avg_pool3d(video[:, :, ::t], (1, s, s)))

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> Any:
        """Decode latents to (batch, 3, frames, height, width)."""
        s, t = self.config.scale_factor_spatial, self.config.scale_factor_temporal
        video = latents.repeat_interleave(s, dim=-2).repeat_interleave(s, dim=-1)
        video = torch.cat([video[:, :, :1], video[:, :, 1:].repeat_interleave(t, dim=2)], dim=2)
        return SimpleNamespace(sample=video) if return_dict else (video,)
