"""The scheduler of a pipeline made observable: its step list, its noise levels, and edits of the schedule."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from interventions.base import Schedule


class UnsupportedSolverError(ValueError):
    """The pipeline's scheduler is not one whose clean estimate and step list are understood."""


class SolverTap:
    """Wrap the two scheduler methods that a diffusers loop calls, and nothing else.

    ``step`` hands prediction and latents through ``on_prediction`` before the solver and its result through
    ``on_stepped`` after it. ``set_timesteps`` applies the schedule edit of the run. With no edit and identity
    callbacks the loop is bit-equal to the bare pipeline's.

    Raises
    ------
    UnsupportedSolverError : the scheduler is not a deterministic flow-matching Euler solver.
    """

    def __init__(self, scheduler: Any, on_prediction: Callable[[Any], Any], on_stepped: Callable[[Any], Any]) -> None:
        name = type(scheduler).__name__
        if name != "FlowMatchEulerDiscreteScheduler" or scheduler.config.get("stochastic_sampling"):
            # Others keep history, call the denoiser twice a step or draw noise, and each would need its own proof.
            raise UnsupportedSolverError(
                f"scheduler {name}{' with stochastic_sampling' if scheduler.config.get('stochastic_sampling') else ''} "
                "is not supported. Use FlowMatchEulerDiscreteScheduler without stochastic_sampling."
            )
        self.scheduler = scheduler
        self.schedule: Schedule | None = None
        self.order: list[int] = []
        """Position in the sigma table of each loop iteration."""
        self.loops = 0
        """Solver steps taken so far in the current run."""
        self._on_prediction, self._on_stepped = on_prediction, on_stepped
        self._original_step = scheduler.step
        self._original_set_timesteps = scheduler.set_timesteps
        self.attach()

    def attach(self) -> None:
        """Put the wrap on the scheduler."""
        self.scheduler.step = MethodType(self._step, self.scheduler)
        self.scheduler.set_timesteps = MethodType(self._set_timesteps, self.scheduler)

    def release(self) -> None:
        """Give the scheduler its own methods back."""
        del self.scheduler.step, self.scheduler.set_timesteps

    def start(self, schedule: Schedule | None) -> None:
        """Prepare for one run with a schedule edit, or None for the scheduler's own schedule."""
        self.schedule, self.loops = schedule, 0

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise level entering each position of the table, and the final one; length positions + 1."""
        return tuple(float(s) for s in self.scheduler.sigmas)

    def _set_timesteps(self, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        self._original_set_timesteps(*args, **kwargs)
        self.loops = 0
        self.order = list(range(len(scheduler.timesteps)))
        if self.schedule is None:
            return
        s = self.schedule.step
        if self.schedule.edit == "drop":
            keep = [i for i in range(len(scheduler.sigmas)) if i != s]
            scheduler.timesteps = scheduler.timesteps[keep[:-1]]
            scheduler.sigmas = scheduler.sigmas[keep]
            self.order = self.order[:-1]
        else:
            self.order = self.order[: s + 1] + self.order[s:]
            scheduler.timesteps = scheduler.timesteps[self.order]

    def _step(
        self,
        scheduler: Any,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        model_output, sample = self._on_prediction((model_output, sample))
        if self.schedule is not None:
            # A repeated timestep is ambiguous to the scheduler's own look-up, so its position is set explicitly.
            scheduler._step_index = self.order[self.loops]
        self.loops += 1
        result = self._original_step(model_output, timestep, sample, *args, return_dict=False, **kwargs)
        stepped = self._on_stepped(result[0])
        if return_dict:
            raise UnsupportedSolverError("the pipeline asked its scheduler for a dict; only the tuple form is wrapped")
        return (stepped, *result[1:])


def clean_estimate(latents: torch.Tensor, prediction: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return x0_hat = x - sigma v, the clean estimate on the linear path x = (1 - sigma) x0 + sigma eps."""
    return latents - sigma * prediction
