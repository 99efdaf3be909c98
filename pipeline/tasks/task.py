"""What a task is: a frozen config that makes samples, builds run inputs and decodes latents, found by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from interventions.record import RunInputs
from pipeline.samples import Sample


class Sampler(BaseModel):
    """How the pipeline denoises."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0


class Task(BaseModel):
    """A family of problems with a contrast pair each; subclasses add parameters as fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    summary: ClassVar[str] = ""

    name: str

    def samples(self) -> list[Sample]:
        """Return every sample of the sweep, in the order of the store's ``sample`` dimension."""
        raise NotImplementedError

    def latent_shape(self) -> tuple[int, int, int]:
        """Return (frames, height, width) of the latents."""
        raise NotImplementedError

    def preview_size(self) -> tuple[int, int]:
        """Return (height, width) of the frames that ``decode`` gives."""
        raise NotImplementedError

    def inputs(self, pipe: Any, sample: Sample, sampler: Sampler) -> RunInputs:
        """Return the inputs of the clean and the corrupted run of a sample, in this order."""
        raise NotImplementedError

    def decode(self, pipe: Any, latents: Any) -> NDArray[np.float32]:
        """Decode latents (rows, C, F, H, W) to videos (rows, frames, y, x, 3), RGB 0 to 255."""
        raise NotImplementedError


TASKS: dict[str, type[Task]] = {}
T = TypeVar("T", bound=type[Task])


def register_task(name: str) -> Callable[[T], T]:
    """Register a task class under the name that configs use.

    Raises
    ------
    ValueError : the name is taken.
    """

    def add(cls: T) -> T:
        if name in TASKS and TASKS[name] is not cls:
            raise ValueError(f"task {name!r} is registered twice: by {TASKS[name]} and by {cls}")
        TASKS[name] = cls
        return cls

    return add
