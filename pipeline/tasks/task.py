"""What a task is: a frozen config that makes samples, builds run inputs and decodes latents, found by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from interventions.record import RunInputs
from pipeline.samples import Sample
from pipeline.yaml_source import Loc

if TYPE_CHECKING:
    from pipeline.models import ModelInfo

Scalar = bool | int | Annotated[float, Field(allow_inf_nan=False)] | str | None


class Sampler(BaseModel):
    """How the pipeline denoises; ``arguments`` are passed on to its call."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    arguments: dict[str, Scalar] = Field(default_factory=dict)


class Task(BaseModel):
    """A family of problems with a contrast pair each; subclasses add parameters as fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    summary: ClassVar[str] = ""

    name: str

    @property
    def decodes(self) -> bool:
        """Whether latents of its runs are decoded at all; metrics of videos and previews need that."""
        return True

    def identity(self) -> dict[str, Any]:
        """Return everything of the task that can change a result, JSON-able."""
        return self.model_dump(mode="json")

    def sets(self, model: ModelInfo) -> frozenset[str]:
        """Return the names of the pipeline call's arguments that ``inputs`` sets."""
        raise NotImplementedError

    def problems(self, model: ModelInfo, sampler: Sampler) -> list[tuple[Loc, str]]:
        """Return why the task cannot run on a model: places in the config, and what is wrong there."""
        return []

    def count(self) -> int:
        """Return the number of samples, without making them."""
        return len(self.samples())

    def samples(self) -> list[Sample]:
        """Return every sample of the sweep, in the order of the store's ``sample`` dimension."""
        raise NotImplementedError

    def latent_shape(self, model: ModelInfo) -> tuple[int, int, int]:
        """Return (frames, height, width) of the latents."""
        raise NotImplementedError

    def preview_size(self) -> tuple[int, int]:
        """Return (height, width) of the frames that ``preview`` gives."""
        raise NotImplementedError

    def inputs(self, pipe: Any, sample: Sample, sampler: Sampler) -> RunInputs:
        """Return the inputs of the clean and the corrupted run of a sample, in this order."""
        raise NotImplementedError

    def video(self, pipe: Any, latents: Any) -> NDArray[np.float32]:
        """Decode latents (rows, C, F, H, W) to videos (rows, frames, y, x, 3), RGB 0 to 255."""
        raise NotImplementedError

    def preview(self, pipe: Any, latents: Any, frames: int) -> NDArray[np.float32]:
        """Decode latents to small videos of so many frames, (rows, frames, y, x, 3), RGB 0 to 255."""
        return self.video(pipe, latents)


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
