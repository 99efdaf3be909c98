"""What adapters declare as functions, as data instead: callables that can be compared and printed as Python source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from interventions.families.draw import draw, twice
from interventions.families.family import Config


@dataclass(frozen=True, slots=True)
class Constant:
    """The same value for every config."""

    value: Any

    def __call__(self, *_: Any) -> Any:
        """Return the value."""
        return self.value


@dataclass(frozen=True, slots=True)
class Guidance:
    """Guidance that is on while one of some arguments of the pipeline's call is above 1; ``defaults`` are theirs."""

    defaults: Mapping[str, float]

    def __call__(self, shared: Mapping[str, Any]) -> bool:
        """Tell whether guidance is on."""
        return any(float(shared.get(name, default) or 0.0) > 1 for name, default in self.defaults.items())


@dataclass(frozen=True, slots=True)
class GuidanceAsSeen:
    """Guidance of which only one state is known, at these values of the arguments that may switch it.

    Raises
    ------
    ValueError : an argument has another value, so that guidance may be in the other state.
    """

    on: bool
    arguments: Mapping[str, Any]

    def __call__(self, shared: Mapping[str, Any]) -> bool:
        """Tell whether guidance is on."""
        for name, seen in self.arguments.items():
            if shared.get(name, seen) != seen:
                raise ValueError(
                    f"{name}={shared[name]!r}: the adapter knows this pipeline with {name}={seen!r} alone. "
                    "Infer it again from arguments with guidance on."
                )
        return self.on


@dataclass(frozen=True, slots=True)
class Scales:
    """The arguments of a pipeline's call that set the guidance scale."""

    names: tuple[str, ...]

    def __call__(self, scale: float) -> dict[str, Any]:
        """Return them at one scale."""
        return dict.fromkeys(self.names, scale)


@dataclass(frozen=True, slots=True)
class Boundary:
    """Two experts that change over at a fraction, named in the pipeline's config, of the training timesteps."""

    entry: str
    training_steps: int = 1000

    def __call__(self, pipeline_config: Config, timesteps: Sequence[float]) -> tuple[int, ...]:
        """Return the expert of each step."""
        boundary = float(pipeline_config[self.entry]) * self.training_steps
        return tuple(0 if t >= boundary else 1 for t in timesteps)


@dataclass(frozen=True, slots=True)
class EvenSteps:
    """Even sigmas from 1 to 1/n, with the shift ``mu`` that diffusers' ``calculate_shift`` gives a number of tokens."""

    shifted: bool = False

    def __call__(self, scheduler: Any, steps: int, latent_shape: tuple[int, int, int]) -> None:
        """Set a scheduler's steps."""
        more: dict[str, float] = {}
        if self.shifted:
            config = scheduler.config
            slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
            tokens = latent_shape[0] * latent_shape[1] * latent_shape[2]
            more["mu"] = config.base_shift + slope * (tokens - config.base_image_seq_len)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **more)


@dataclass(frozen=True, slots=True)
class StepsAsSeen:
    """Arguments of ``set_timesteps`` that were seen, by number of steps.

    Raises
    ------
    ValueError : no run with this number of steps was seen.
    """

    tables: Mapping[int, Mapping[str, Any]]

    def __call__(self, scheduler: Any, steps: int, latent_shape: tuple[int, int, int]) -> None:
        """Set a scheduler's steps."""
        if steps not in self.tables:
            raise ValueError(
                f"num_inference_steps={steps}: the adapter knows the sigmas for {', '.join(map(str, self.tables))} "
                "steps alone. Write set_steps as the pipeline sets them."
            )
        scheduler.set_timesteps(**self.tables[steps])


@dataclass(frozen=True, slots=True)
class PackedExtent:
    """Extent of packed latents from the arguments of the call: pixels and frames of the video by their compression."""

    frames: str
    compression: tuple[int, int]

    def __call__(self, pipe: Any, shared: Mapping[str, Any], latents: torch.Tensor) -> tuple[int, int, int]:
        """Return (frames, height, width) of the latents.

        Raises
        ------
        ValueError : the latents have another number of tokens.
        """
        temporal, spatial = self.compression
        frames = (int(shared[self.frames]) - 1) // temporal + 1
        height, width = (int(shared[side]) // spatial for side in ("height", "width"))
        if latents.ndim != 3 or latents.shape[1] != frames * height * width:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} are not packed (rows, {frames} x {height} x {width}, "
                f"channels). Give such latents, or another {self.frames}, height or width."
            )
        return frames, height, width


@dataclass(frozen=True, slots=True)
class Drawn:
    """A run of the size of one that was seen, with random tensors.

    Attributes
    ----------
    shared : its arguments. off : arguments that switch guidance off.
    tensors : shape of a row and dtype of its per-run tensors.
    """

    shared: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    off: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, pipe: Any, steps: int, guidance: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Return shared arguments and per-run tensors; the two rows differ in their prompts alone."""
        shared = {**self.shared, "num_inference_steps": steps, **({} if guidance else self.off)}
        tensors = {
            name: self._rows(pipe, name, seed, shape, getattr(torch, dtype))
            for seed, (name, (shape, dtype)) in enumerate(self.tensors.items(), start=1)
        }
        return shared, tensors

    @staticmethod
    def _rows(pipe: Any, name: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if not dtype.is_floating_point:
            return torch.ones(2, *shape, dtype=dtype, device=pipe._execution_device)
        if not is_prompt(name) or is_negative(name):
            return twice(draw(pipe, seed, *shape)).to(dtype)
        # What the tokens of a prompt share keeps prompts apart however many tokens a model averages over.
        common = draw(pipe, 100 + seed, 2, *(1 for _ in shape[1:]), shape[-1])
        return (common + 0.5 * draw(pipe, seed, 2, *shape)).to(dtype)


def is_negative(name: str) -> bool:
    """Tell by its name whether a per-run tensor belongs to the unconditional branch."""
    return any(part in name for part in ("neg", "uncond", "null"))


def is_prompt(name: str) -> bool:
    """Tell by its name whether a per-run tensor carries a prompt, rather than latents of any kind."""
    return "latents" not in name
