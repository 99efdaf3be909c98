"""The schedulers by their formulas: noise levels, clean estimates, and runs whose steps are left out or rearranged.

A one-step solver is the path itself: x = alpha x0 + sigma eps is solved for x0 and eps at one level and put together
at the next. Rearranged runs step by that formula. Multistep solvers, which can only drop a step, get a shorter table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch

Level = tuple[float, float]
MULTISTEP = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")


@dataclass(frozen=True)
class Edit:
    """A run with other steps: "drop" or "repeat" ``step``, or "swap" it with ``other``."""

    mode: str
    step: int
    other: int = -1

    def order(self, steps: int) -> list[int]:
        """Return the steps in the order in which they are taken."""
        if self.mode == "drop":
            return [s for s in range(steps) if s != self.step]
        if self.mode == "repeat":
            return [s for s in range(steps) for _ in range(2 if s == self.step else 1)]
        exchanged = {self.step: self.other, self.other: self.step}
        return [exchanged.get(s, s) for s in range(steps)]

    def ends(self, step: int) -> int:
        """Return the level at which a step ends, as a position in the table."""
        return step + 2 if self.mode == "drop" and step + 1 == self.step else step + 1


@dataclass
class Clock:
    """Where one scheduler is in one run.

    Attributes
    ----------
    levels : (alpha, sigma) entering each step of the unedited table, then of the result.
    order : step of each iteration. loop : iterations taken.
    """

    levels: list[Level] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    loop: int = 0

    @property
    def step(self) -> int:
        """The step that is being taken."""
        return self.order[self.loop]

    @property
    def following(self) -> int:
        """The step after it; the number of steps after the last."""
        return self.order[self.loop + 1] if self.loop + 1 < len(self.order) else len(self.levels) - 1


def levels(scheduler: Any) -> list[Level]:
    """Read the noise levels off a scheduler whose timesteps are set."""
    name, count = type(scheduler).__name__, len(scheduler.timesteps)
    if "DDIM" in name:
        stride = scheduler.config.num_train_timesteps // count
        times = [int(t) for t in scheduler.timesteps]
        products = [float(scheduler.alphas_cumprod[t]) for t in times]
        after = times[-1] - stride
        products.append(float(scheduler.alphas_cumprod[after] if after >= 0 else scheduler.final_alpha_cumprod))
        return [(p**0.5, (1 - p) ** 0.5) for p in products]
    sigmas = [float(s) for s in scheduler.sigmas[: count + 1]]
    if name in ("EulerDiscreteScheduler", "EDMEulerScheduler"):
        return [(1.0, s) for s in sigmas]
    rising = scheduler.config.get("invert_sigmas")
    return [(s, 1 - s) if rising else (1 - s, s) for s in sigmas]


def clean(scheduler: Any, x: torch.Tensor, prediction: torch.Tensor, level: Level) -> torch.Tensor:
    """Return the clean latents that a prediction stands for."""
    name, (alpha, sigma) = type(scheduler).__name__, level
    if name == "EDMEulerScheduler":
        return prediction
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if kind == "epsilon":
        return (x - sigma * prediction) / alpha
    if kind == "v_prediction":
        return alpha * x - sigma * prediction
    return x + sigma * prediction if scheduler.config.get("invert_sigmas") else x - sigma * prediction


def between(scheduler: Any, x: torch.Tensor, prediction: torch.Tensor, here: Level, there: Level) -> torch.Tensor:
    """Go from one level to another along the path that a prediction stands for."""
    x0 = clean(scheduler, x, prediction, here)
    noise = (x - here[0] * x0) / here[1]
    return there[0] * x0 + there[1] * noise


@contextmanager
def ticking(
    scheduler: Any,
    edit: Edit | None,
    before: Callable[[Clock, torch.Tensor, torch.Tensor], torch.Tensor],
    after: Callable[[Clock, torch.Tensor], torch.Tensor],
) -> Iterator[None]:
    """Give a scheduler a class of its own for one run.

    ``before`` gets prediction and latents of every step and returns the prediction to use; ``after`` gets what the
    step gives and returns what the loop goes on with. A deep copy of the scheduler, which LTX-2 makes for its audio,
    takes its steps in the same order but is not shown.
    """
    plain = type(scheduler)
    shows = "pred_original_sample" if plain.__name__ == "EDMEulerScheduler" else "model_output"

    class Ticking(plain):  # type: ignore[misc, valid-type]
        @wraps(plain.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            plain.set_timesteps(self, *args, **kwargs)
            count = len(self.timesteps)
            self.clock = Clock(levels(self), edit.order(count) if edit else list(range(count)))
            if edit:
                self.timesteps = self.timesteps[self.clock.order]
                if getattr(self, "sigmas", None) is not None:
                    self.sigmas = torch.cat([self.sigmas[self.clock.order], self.sigmas[count : count + 1]])

        @wraps(plain.step)
        def step(self, *args: Any, **kwargs: Any) -> Any:
            call = inspect.signature(plain.step).bind(self, *args, **kwargs)
            given = call.arguments
            if given.get(shows) is None:
                return plain.step(self, *args, **kwargs)
            if self is scheduler:
                given[shows] = before(self.clock, given[shows], given["sample"])
            if edit and plain.__name__ not in MULTISTEP:
                result = self.formula(given[shows], given["sample"])
            else:
                found = plain.step(*call.args, **call.kwargs)
                result = found[0] if isinstance(found, tuple) else found.prev_sample
            if self is scheduler:
                result = self.carried(result, after(self.clock, result))
            self.clock.loop += 1
            return (result, None) if given.get("return_dict") is False else SimpleNamespace(prev_sample=result)

        def formula(self, prediction: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
            table, step = self.clock.levels, self.clock.step
            if hasattr(self, "_step_index"):
                self._step_index = self.clock.loop + 1
            return between(self, sample.float(), prediction, table[step], table[edit.ends(step)])

        def carried(self, result: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
            # UniPC corrects the latents it gave from those of the step before, so an edit shifts both.
            here, there = (self.clock.levels[s][1] for s in (self.clock.step, self.clock.following))
            if edited is not result and getattr(self, "last_sample", None) is not None and there > 0:
                self.last_sample = self.last_sample + (edited - result) * here / there
            return edited

    Ticking.__name__ = plain.__name__
    scheduler.__class__ = Ticking
    try:
        yield
    finally:
        scheduler.__class__ = plain
        vars(scheduler).pop("clock", None)
