"""What every intervention is: frozen data that says where it acts and what it does there, found by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from interventions.attention import Edges
from interventions.sites import AttentionAt, BlockAt, Branch, Geometry, NoSuchSiteError, Point, RunName


@dataclass(frozen=True, slots=True)
class Indexes:
    """Marks an integer field as an index along a coordinate, so that its range is checked and "all" expands.

    ``window`` names the field that says how many consecutive indices from this one on are meant.
    """

    coordinate: str
    window: str = ""


StepIndex = Annotated[int, Field(ge=0), Indexes("step", "steps")]
LayerIndex = Annotated[int, Field(ge=0), Indexes("layer", "layers")]
FrameIndex = Annotated[int, Field(ge=0), Indexes("frame")]
HeadIndex = Annotated[int, Field(ge=0), Indexes("head")]
Window = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A change of the solver's step list, shared by every row of a forward.

    Attributes
    ----------
    edit : "drop" removes ``step`` from the sigma schedule; "repeat" takes ``step`` twice; "swap" takes ``other``
        in the place of ``step`` and the other way round.
    step, other : indices in the unchanged schedule.
    """

    edit: Literal["drop", "repeat", "swap"]
    step: int
    other: int | None = None


@dataclass(frozen=True, slots=True, order=True)
class RunRef:
    """A recorded run, seen from the sample at hand.

    Attributes
    ----------
    run : clean or corrupted.
    sample : offset along the sweep's problems, cyclic, to the sample of the same pair and seed there; with ``fixed``,
        counted from the first problem instead.
    seed : offset of the initial noise's seed; 0 is the sample's own noise.
    """

    run: RunName
    sample: int = 0
    seed: int = 0
    fixed: bool = False

    @property
    def own(self) -> bool:
        """Whether this is a run of the sample at hand itself."""
        return self.sample == 0 and self.seed == 0 and not self.fixed


Source = tuple[RunRef, ...]
"""Where donor values come from: the mean over these runs."""


@dataclass(frozen=True, slots=True)
class Read:
    """A value that an intervention needs from recorded runs: the mean of ``point`` over ``source``."""

    point: Point
    source: Source


@dataclass(slots=True, kw_only=True)
class RowContext:
    """What an intervention may read while it acts on one row of a run.

    Attributes
    ----------
    geometry : extent of the run.
    levels : (alpha, sigma) of the latents entering each step, x = alpha x0 + sigma eps; then those of the result.
    seed : integers that identify the sample; every random draw derives from them and from coordinates.
    donors : the value of every ``Read``: (tokens, channels) at a site, (C, F, H, W) of latents, a mapping of a prompt.
    recorded_x0_hat : per step, the clean estimate of the recipient's recorded run, (C, F, H, W).
    x0_hat : this row's latest clean estimate, None before its first prediction.
    latents_before : latents that entered the current step.
    previous_prediction : guided prediction of the step before, None at the first.
    previous_outputs : denoiser output of the step before, by branch.
    """

    geometry: Geometry
    levels: tuple[tuple[float, float], ...]
    seed: tuple[int, ...]
    donors: dict[Read, Any] = field(default_factory=dict)
    recorded_x0_hat: list[torch.Tensor] = field(default_factory=list)
    x0_hat: torch.Tensor | None = None
    latents_before: torch.Tensor | None = None
    previous_prediction: torch.Tensor | None = None
    previous_outputs: dict[Branch, torch.Tensor] = field(default_factory=dict)

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
    formula : the definition in one line, for listings, docs and store attributes.
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
    def restores(self) -> bool:
        """Whether values of the undisturbed run are brought back, and with them what was changed before is undone."""
        return False

    @property
    def schedule(self) -> Schedule | None:
        """A change of the step list that all rows of a forward must share, or None."""
        return None

    def first_computed_step(self, geometry: Geometry) -> int:
        """Return the first step whose denoiser call differs from the recipient's recorded run."""
        return min(p.step for p in self.points(geometry))

    def points(self, geometry: Geometry) -> tuple[Point, ...]:
        """Return every point of the run at which the engine must come to this intervention."""
        raise NotImplementedError

    def reads(self, geometry: Geometry) -> tuple[Read, ...]:
        """Return every donor value that ``apply`` needs."""
        return ()

    def references(self, geometry: Geometry) -> frozenset[RunRef]:
        """Return the recorded runs that ``reads`` names."""
        return frozenset(ref for read in self.reads(geometry) for ref in read.source)

    def apply(self, point: Point, value: Any, context: RowContext) -> Any:
        """Return the new value of one row at ``point``; must not write into ``value``.

        ``value`` is (C, F, H, W) for latents and predictions, (tokens, channels) for a site, the row of the
        denoiser's output in its own layout for an output, and a mapping of tensors for a prompt.
        """
        raise NotImplementedError

    def program(self, point: BlockAt) -> tuple[int, ...]:
        """Return the blocks that run in the place of block ``point.block``: none skips it, twice itself repeats it."""
        return (point.block,)

    def cut(self, point: AttentionAt, geometry: Geometry) -> tuple[Edges, ...]:
        """Return the attention edges that are removed at ``point``."""
        return ()

    def check(self, geometry: Geometry) -> None:
        """Check that everything this intervention names exists.

        Raises
        ------
        NoSuchSiteError : it does not; the message says what there is.
        """
        edit = self.schedule
        if edit is not None and edit.edit not in geometry.edits:
            raise NoSuchSiteError(
                f"{geometry.solver or 'this solver'} does not allow the schedule edit {edit.edit!r}: it keeps a "
                f"history of steps or derives their size. It allows {', '.join(geometry.edits) or 'none'}."
            )
        for point in self.points(geometry):
            geometry.require(point)
        for read in self.reads(geometry):
            geometry.require(read.point)


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


def index_fields(cls: type[BaseModel]) -> dict[str, Indexes]:
    """Map each index field of a kind to the coordinate it runs along."""
    found: dict[str, Indexes] = {}
    for name, info in cls.model_fields.items():
        for mark in _marks(info.annotation, info.metadata):
            found[name] = mark
    return found


def _marks(annotation: Any, metadata: Sequence[Any]) -> list[Indexes]:
    marks = [m for m in metadata if isinstance(m, Indexes)]
    for inner in getattr(annotation, "__args__", ()):
        marks += _marks(inner, list(getattr(inner, "__metadata__", ())))
    return marks


def window(start: int, length: int, extent: int, what: str) -> range:
    """Return ``length`` consecutive indices from ``start``.

    Raises
    ------
    NoSuchSiteError : the window reaches beyond the last index.
    """
    if start + length > extent:
        raise NoSuchSiteError(f"{length} {what}s from {what} {start} reach beyond the last, {what} {extent - 1}")
    return range(start, start + length)
