"""What goes into a run and what a run leaves behind, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from interventions.sites import Branch, Geometry, RunName


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """The inputs of the runs of one sample.

    Attributes
    ----------
    shared : keyword arguments of the pipeline call that are equal for all runs (image, size, steps, guidance).
    per_run : tensors with one row a run, in the order of ``names`` (``latents`` and ``prompt_embeds`` at least).
    names : the runs, usually ("clean", "corrupted").
    seed : integers that identify the sample, for every draw an intervention makes.
    """

    shared: Mapping[str, Any]
    per_run: Mapping[str, torch.Tensor]
    names: tuple[RunName, ...]
    seed: tuple[int, ...]

    def rows(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Gather one row of every per-run tensor for each index."""
        return {name: value[list(indices)] for name, value in self.per_run.items()}


@dataclass(slots=True, kw_only=True)
class Record:
    """What a recorded batch of runs leaves behind: latent-sized tensors and the prompt, nothing larger.

    Attributes
    ----------
    outputs : what the denoiser returned at every call, as it returned it.
    latents : latents entering each step, then the last result of the solver; steps + 1 tensors (runs, C, F, H, W).
    x0_hat : clean estimate at each step; steps tensors.
    levels : (alpha, sigma) of the latents entering each step, then of the result; steps + 1 pairs.
    conditioning : prompt arguments of the denoiser by branch, one row a run.
    final : what the pipeline returned, (runs, C, F, H, W).
    entry_scale : factor between the latents given to the pipeline and those entering step 0; None if not a factor.
    """

    inputs: RunInputs
    geometry: Geometry
    levels: tuple[tuple[float, float], ...]
    outputs: list[Any]
    latents: list[torch.Tensor]
    x0_hat: list[torch.Tensor]
    conditioning: dict[Branch, dict[str, torch.Tensor]]
    final: torch.Tensor
    entry_scale: float | None = 1.0

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise level entering each step, then the final one."""
        return tuple(sigma for _, sigma in self.levels)

    def row(self, run: RunName) -> int:
        """Return the batch row of a run."""
        return self.inputs.names.index(run)

    def call_rows(self, call: tuple[Branch, ...], runs: Sequence[int]) -> list[int]:
        """Return the rows of a denoiser call's output that belong to some runs, branch by branch."""
        return [k * len(self.inputs.names) + run for k in range(len(call)) for run in runs]


@dataclass(slots=True, kw_only=True)
class Fork:
    """Results of a batch of intervened rows.

    Attributes
    ----------
    final : what the pipeline returned, (rows, C, F, H, W).
    x0_hat : clean estimate of every loop iteration by its step, if asked for.
    fired : edits made, always equal to the number planned.
    """

    final: torch.Tensor
    x0_hat: dict[int, torch.Tensor] = field(default_factory=dict)
    fired: int = 0
