"""What every intervention is: frozen data that says where it acts and what it does there, found by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from interventions.sites import Branch, Geometry, Point, RunName, Site


@dataclass(frozen=True, slots=True)
class Indexes:
    """Marks an integer field as an index along a coordinate, so that its range is checked and "all" expands."""

    coordinate: str


StepIndex = Annotated[int, Field(ge=0), Indexes("step")]
LayerIndex = Annotated[int, Field(ge=0), Indexes("layer")]
FrameIndex = Annotated[int, Field(ge=0), Indexes("frame")]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A change of the solver's step list, shared by every row of a forward.

    Attributes
    ----------
    edit : "drop" removes ``step`` from the sigma schedule; "repeat" takes ``step`` twice.
    step : index in the unchanged schedule.
    """

    edit: str
    step: int


@dataclass(slots=True, kw_only=True)
class RowContext:
    """What an intervention may read while it acts on one row of a run.

    Attributes
    ----------
    geometry : extent of the run.
    sigmas : noise level entering each step, then the final 0; length steps + 1.
    seed : integers that identify the sample; every random draw derives from them and from coordinates.
    donors : activations of the donor run at the sites the intervention asked for, (tokens, channels) each.
    recorded_x0_hat : per step, the clean estimate of the recipient's recorded run, (C, F, H, W).
    x0_hat : this row's latest clean estimate, None before its first prediction.
    latents_before : latents that entered the current step.
    previous_prediction : guided prediction of the step before, None at the first.
    """

    geometry: Geometry
    sigmas: tuple[float, ...]
    seed: tuple[int, ...]
    donors: dict[Site, torch.Tensor] = field(default_factory=dict)
    recorded_x0_hat: list[torch.Tensor] = field(default_factory=list)
    x0_hat: torch.Tensor | None = None
    latents_before: torch.Tensor | None = None
    previous_prediction: torch.Tensor | None = None

    def generator(self, purpose: str, *coordinates: int) -> np.random.Generator:
        """Return a generator seeded by the sample, the purpose and coordinates, never by worker or order."""
        text = ":".join([purpose, *map(str, self.seed), *map(str, coordinates)])
        return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"))

    def noise_like(self, value: torch.Tensor, purpose: str, *coordinates: int) -> torch.Tensor:
        """Draw unit Gaussian noise of the shape of ``value``, on the CPU so that every device sees the same."""
        draw = torch.from_numpy(
            self.generator(purpose, *coordinates).standard_normal(tuple(value.shape), dtype=np.float32)
        )
        return draw.to(device=value.device, dtype=value.dtype)


class Intervention(BaseModel):
    """One change to one run, as data; subclasses add fields and say where and how they act.

    Class attributes
    ----------------
    formula : the definition, for docs and store attributes.
    example : a YAML fragment for an experiment of this kind.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    formula: ClassVar[str] = ""
    example: ClassVar[str] = ""
    contrast: ClassVar[bool] = False
    """Whether the effect is a recovery between the two runs of a pair (else a difference from the recipient)."""

    @property
    def recipient(self) -> RunName:
        """The run that is changed."""
        return getattr(self, "run", "clean")

    @property
    def donor(self) -> RunName | None:
        """The run whose activations are written, None if the intervention needs none."""
        return None

    @property
    def schedule(self) -> Schedule | None:
        """A change of the step list that all rows of a forward must share, or None."""
        return None

    def first_computed_step(self, geometry: Geometry) -> int:
        """Return the first step whose denoiser call differs from the recipient's recorded run."""
        return min(p.step for p in self.points(geometry))

    def points(self, geometry: Geometry) -> tuple[Point, ...]:
        """Return every point of the run at which ``apply`` must be called."""
        raise NotImplementedError

    def donor_sites(self, geometry: Geometry) -> tuple[Site, ...]:
        """Return the sites whose donor activations ``apply`` reads."""
        return ()

    def apply(self, point: Point, value: torch.Tensor, context: RowContext) -> torch.Tensor:
        """Return the new value of one row at ``point``; must not write into ``value``.

        ``value`` is (C, F, H, W) for latents and predictions and (tokens, channels) for a site.
        """
        raise NotImplementedError


KINDS: dict[str, type[Intervention]] = {}
T = TypeVar("T", bound=type[Intervention])


def register(kind: str) -> Callable[[T], T]:
    """Register an intervention class under the name that configs use.

    Raises
    ------
    ValueError : the name is taken.
    """

    def add(cls: T) -> T:
        if kind in KINDS and KINDS[kind] is not cls:
            raise ValueError(f"intervention kind {kind!r} is registered twice: by {KINDS[kind]} and by {cls}")
        KINDS[kind] = cls
        return cls

    return add


def index_fields(cls: type[Intervention]) -> dict[str, str]:
    """Map each index field of a kind to the coordinate it runs along."""
    found: dict[str, str] = {}
    for name, info in cls.model_fields.items():
        for mark in _marks(info.annotation, info.metadata):
            found[name] = mark.coordinate
    return found


def _marks(annotation: Any, metadata: list[Any]) -> list[Indexes]:
    marks = [m for m in metadata if isinstance(m, Indexes)]
    for inner in getattr(annotation, "__args__", ()):
        marks += _marks(inner, list(getattr(inner, "__metadata__", ())))
    return marks


def sites_at(
    step: int, layer: int, component: Any, geometry: Geometry, branch: Branch | str = "both"
) -> tuple[Site, ...]:
    """Return the sites of one component at one step in the asked guidance branches."""
    branches = geometry.branches if branch == "both" else (branch,)
    return tuple(Site(step, b, layer, component) for b in branches)  # type: ignore[arg-type]


def over_frames(
    value: torch.Tensor, geometry: Geometry, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Apply ``change`` to a token sequence seen as (frames, tokens per frame, channels)."""
    return change(value.unflatten(0, (geometry.frames, -1))).flatten(0, 1)
