"""The scheduler of a pipeline made observable: its step list, its noise levels, and edits of the schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import count
from types import MethodType
from typing import Any

import torch

from interventions.base import Schedule
from interventions.solvers import Steps, check_step_arguments, edit_schedule, levels, place, solver_of


class SolverTap:
    """Wrap the two scheduler methods that a diffusers loop calls, and nothing else.

    ``step`` hands prediction and latents through ``on_prediction`` before the solver and its result through
    ``on_stepped`` after it. ``set_timesteps`` applies the schedule edit of the run. With no edit and identity
    callbacks the loop is bit-equal to the bare pipeline's.

    Raises
    ------
    UnsupportedSolverError : the scheduler is of no class whose clean estimate and step list are understood.
    """

    def __init__(self, scheduler: Any, on_prediction: Callable[[Any], Any], on_stepped: Callable[[Any], Any]) -> None:
        self.scheduler = scheduler
        self.kind = solver_of(scheduler)
        self.schedule: Schedule | None = None
        self._steps = Steps(order=())
        """Where the scheduler must be at each loop iteration; empty without a schedule edit."""
        self.loops = 0
        """Solver steps taken so far in the current run."""
        self._on_prediction, self._on_stepped = on_prediction, on_stepped
        self._original_step = scheduler.step
        self._original_set_timesteps = scheduler.set_timesteps
        self._step_signature = inspect.signature(self._original_step)
        self._copies: dict[int, tuple[Steps, Iterator[int]]] = {}
        self.attach()

    def attach(self) -> None:
        """Put the wrap on the scheduler."""
        step, set_timesteps = self._original_step, self._original_set_timesteps
        self.scheduler.step = _shown_as(self.scheduler, step, self._step, self._step_of_copy)
        self.scheduler.set_timesteps = _shown_as(
            self.scheduler, set_timesteps, self._set_timesteps, self._set_timesteps_of_copy
        )

    def release(self) -> None:
        """Give the scheduler its own methods back."""
        del self.scheduler.step, self.scheduler.set_timesteps

    def start(self, schedule: Schedule | None) -> None:
        """Prepare for one run with a schedule edit, or None for the scheduler's own schedule."""
        self.schedule, self.loops, self._steps = schedule, 0, Steps(order=())
        self._copies.clear()

    @property
    def levels(self) -> tuple[tuple[float, float], ...]:
        """(alpha, sigma) of the latents entering each position of the table, then of the result."""
        return levels(self.scheduler)

    def carry(self, difference: torch.Tensor) -> None:
        """Make an edit of the latents that have just left a step last, where the solver would undo it.

        UniPC's corrector computes the next latents anew from the ones before the step, x_t = (sigma_t / sigma_s) x_s
        + terms without x (Zhao et al. 2023, arXiv 2302.04867, eq. 9 with data prediction), so an edit of x_t lasts
        as the difference it makes if sigma_s / sigma_t times it is added to x_s.

        Parameters
        ----------
        difference : edited minus original latents, in the loop's layout.
        """
        scheduler = self.scheduler
        if getattr(scheduler, "last_sample", None) is None:
            return
        before, now = (self.levels[scheduler.step_index - k][1] for k in (1, 0))
        if now > 0:
            scheduler.last_sample = scheduler.last_sample + difference.to(scheduler.last_sample) * (before / now)

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        self._original_set_timesteps(*args, **kwargs)
        self.loops = 0
        if self.schedule is not None:
            edit = self.schedule
            self._steps = edit_schedule(self.scheduler, self.kind, edit.edit, edit.step, edit.other)

    def _set_timesteps_of_copy(self, plain: Callable[..., Any], copy: Any, *args: Any, **kwargs: Any) -> None:
        # LTX-2 denoises its audio with a deep copy of the scheduler, whose steps must be those of the video.
        plain(copy, *args, **kwargs)
        if self.schedule is not None:
            edit = self.schedule
            self._copies[id(copy)] = edit_schedule(copy, self.kind, edit.edit, edit.step, edit.other), count()

    def _step_of_copy(self, plain: Callable[..., Any], copy: Any, *args: Any, **kwargs: Any) -> Any:
        if id(copy) not in self._copies:
            return plain(copy, *args, **kwargs)
        steps, loops = self._copies[id(copy)]
        with place(copy, steps, next(loops)):
            return plain(copy, *args, **kwargs)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        call = self._step_signature.bind(*args, **kwargs)
        given = call.arguments
        check_step_arguments(self.kind, given)
        name = self.kind.prediction_keyword or "model_output"
        if given.get(name) is None:
            # Only converts a model output; the pipeline takes the step back and calls again.
            return self._original_step(*args, **kwargs)
        given[name], given["sample"] = self._on_prediction((given[name], given["sample"]))
        with place(self.scheduler, self._steps, self.loops):
            result = self._original_step(*call.args, **call.kwargs)
        self.loops += 1
        if isinstance(result, tuple):
            return (self._on_stepped(result[0]), *result[1:])
        result.prev_sample = self._on_stepped(result.prev_sample)
        return result


def _shown_as(scheduler: Any, original: Any, wrap: Callable[..., Any], of_copy: Callable[..., Any]) -> MethodType:
    """Return a method that pipelines take for ``original``: they look at its parameters to decide what to pass.

    A deep copy of the scheduler has the method too, bound to the copy, on which it must act: ``of_copy`` gets the
    original as a function, then the copy.
    """

    plain = getattr(original, "__func__", lambda owner, *args, **kwargs: original(*args, **kwargs))

    def call(owner: Any, *args: Any, **kwargs: Any) -> Any:
        return wrap(*args, **kwargs) if owner is scheduler else of_copy(plain, owner, *args, **kwargs)

    call.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    return MethodType(call, scheduler)
