"""Several interventions made in one run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from interventions.base import (
    KINDS,
    FrameIndex,
    HeadIndex,
    Intervention,
    LayerIndex,
    Read,
    RowContext,
    Schedule,
    StepIndex,
    register,
)
from interventions.edges import Edges
from interventions.sites import AttentionAt, BlockAt, Geometry, LatentsAt, NoSuchSiteError, Point, RunName, Site

SHARED = "shared"
"""Written for an index field of a part: the value is the compose's own."""
INDEXES = ("step", "layer", "frame", "head")

Fields = tuple[tuple[str, str | int | float | bool | None], ...]


def _as_pairs(parts: Any) -> Any:
    """Turn a mapping of mappings into pairs, which can be hashed, and refuse what no part can be."""
    if isinstance(parts, Mapping):
        parts = tuple((str(name), tuple(f.items()) if isinstance(f, Mapping) else f) for name, f in parts.items())
    elif isinstance(parts, (list, tuple)) and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in parts):
        parts = tuple((name, tuple(map(tuple, f)) if isinstance(f, (list, tuple)) else f) for name, f in parts)
    else:
        raise _refusal("expected a mapping from a name to the fields of an intervention")
    for name, fields in parts:
        _check_fields(name, fields)
    names = [name for name, _ in parts]
    if names != sorted(set(names)):
        raise _refusal(f"parts act in the order of their names: name them so, as in 1_{names[0]}, not {names}")
    return parts


def _check_fields(name: str, fields: Any) -> None:
    if not isinstance(fields, tuple):
        raise _refusal(f"part {name}: expected the fields of an intervention, {fields!r} is not a mapping")
    given = dict(fields)
    allowed = [kind for kind in KINDS if kind != "compose"]
    if given.get("kind") not in allowed:
        raise _refusal(f"part {name}: kind {given.get('kind')!r} cannot be a part; allowed: {', '.join(allowed)}")
    for field, value in fields:
        known = KINDS[given["kind"]].model_fields
        if field not in known:
            raise _refusal(f"part {name}: unknown key {field!r}; allowed: {', '.join(known)}")
        if isinstance(value, (list, tuple, Mapping)) or (field in INDEXES and (value == "all" or ":" in str(value))):
            raise _refusal(
                f"part {name}: {field} is {value!r}, but a field of a part has one value; "
                f"to sweep {' or '.join(INDEXES)}, write it beside parts and leave it out of the part"
            )


def _refusal(text: str) -> PydanticCustomError:
    return PydanticCustomError("parts", "{text}", {"text": text})


Parts = Annotated[
    tuple[tuple[str, Fields], ...],
    BeforeValidator(_as_pairs),
    PlainSerializer(lambda parts: {name: dict(fields) for name, fields in parts}),
    Field(min_length=1),
]


@register("compose")
class Compose(Intervention):
    """Make several interventions in one run, as a mapping of parts that act in the order of their names.

    At a point that several parts share, each sees what the part before it left. Elsewhere the model's own order
    decides. ``step``, ``layer``, ``frame`` and ``head`` are for sweeps: a part that leaves a required one out has the
    compose's, and so has a part that says "shared". At most one part may change the schedule, and the parts must
    change the same run.
    """

    formula: ClassVar[str] = "value at a point <- part_n(... part_1(value)); edges that any part cuts are cut"
    example: ClassVar[str] = (
        "shuffled_and_patched:\n  kind: compose\n  step: all\n  parts:\n"
        "    1_shuffle: {kind: frame_shuffle, mode: reverse, step: 0}\n"
        "    2_patch: {kind: patch, direction: noising, layer: 0}"
    )

    kind: Literal["compose"] = "compose"
    step: StepIndex | None = None
    layer: LayerIndex | None = None
    frame: FrameIndex | None = None
    head: HeadIndex | None = None
    parts: Parts

    @property
    def built(self) -> Mapping[str, Intervention]:
        """The parts as interventions, by name and in order."""
        return _built(self)

    @model_validator(mode="after")
    def _parts_fit(self) -> Compose:
        taken = {index for _, fields in self.parts for index in _taken(dict(fields))}
        unused = [index for index in INDEXES if getattr(self, index) is not None and index not in taken]
        if unused:
            raise ValueError(
                f"no part takes {unused[0]} from the compose: leave it out of a part, or write {SHARED} there"
            )
        scheduled = [name for name, part in self.built.items() if part.schedule is not None]
        if len(scheduled) > 1:
            raise ValueError(f"one run has one schedule, but parts {' and '.join(scheduled)} change it")
        recipients = {name: part.recipient for name, part in self.built.items()}
        if len(set(recipients.values())) > 1:
            each = ", ".join(f"{name} the {run} one" for name, run in recipients.items())
            raise ValueError(f"parts must change the same run, but {each}: set run or direction")
        return self

    @property
    def recipient(self) -> RunName:
        """The run that all parts change."""
        return next(iter(self.built.values())).recipient

    @property
    def schedule(self) -> Schedule | None:
        """The schedule change of the part that has one."""
        return next((part.schedule for part in self.built.values() if part.schedule is not None), None)

    def first_computed_step(self, geometry: Geometry) -> int:
        """Return the earliest of the parts."""
        return min(part.first_computed_step(geometry) for part in self.built.values())

    def points(self, geometry: Geometry) -> tuple[Point, ...]:
        """Return the points of all parts, each once."""
        return tuple(_acting(self, geometry))

    def reads(self, geometry: Geometry) -> tuple[Read, ...]:
        """Return what any part reads, each once."""
        return tuple(dict.fromkeys(read for part in self.built.values() for read in part.reads(geometry)))

    def apply(self, point: Point, value: Any, context: RowContext) -> Any:
        """Let the parts that act here change the value one after the other."""
        for name in _acting(self, context.geometry)[point]:
            value = self.built[name].apply(point, value, context)
        return value

    def program(self, point: BlockAt) -> tuple[int, ...]:
        """Return the program of the one part that replaces the block."""
        itself = (point.block,)
        programs = (part.program(point) for part in self.built.values())
        return next((program for program in programs if program != itself), itself)

    def cut(self, point: AttentionAt, geometry: Geometry) -> tuple[Edges, ...]:
        """Return the edges that any part cuts here."""
        names = _acting(self, geometry)[point]
        return tuple(edge for name in names for edge in self.built[name].cut(point, geometry))

    def check(self, geometry: Geometry) -> None:
        """Check every part by itself, then that they do not make each other void."""
        for name, part in self.built.items():
            frame = getattr(part, "frame", None)
            try:
                part.check(geometry)
            except NoSuchSiteError as error:
                raise NoSuchSiteError(f"part {name}: {error}") from error
            if frame is not None and frame >= geometry.frames:
                raise NoSuchSiteError(f"part {name}: no frame {frame}, frames are 0 to {geometry.frames - 1}")
        self._check_blocks(geometry)
        self._check_steps(geometry)
        self._check_restored(geometry)

    def _check_blocks(self, geometry: Geometry) -> None:
        acting = _acting(self, geometry)
        for point, names in acting.items():
            if isinstance(point, BlockAt) and len(names) > 1:
                raise NoSuchSiteError(
                    f"parts {' and '.join(names)} both replace block {point.block}, step {point.step}"
                )
            if not isinstance(point, (Site, AttentionAt)) or point.component in ("update", "residual"):
                continue
            if by := acting.get(BlockAt(point.step, point.branch, point.block)):
                raise NoSuchSiteError(
                    f"part {names[0]} acts inside block {point.block} at step {point.step}, which part {by[0]} replaces"
                )

    def _check_restored(self, geometry: Geometry) -> None:
        first = {name: part.first_computed_step(geometry) for name, part in self.built.items()}
        for name, part in self.built.items():
            undone = [other for other in first if first[other] < first[name]]
            if part.restores and undone:
                raise NoSuchSiteError(
                    f"part {name} re-noises the estimate of the undisturbed run, which undoes part {undone[0]} before "
                    "it: use latent_noise, which re-noises the run's own"
                )

    def _check_steps(self, geometry: Geometry) -> None:
        edit = self.schedule
        if edit is None:
            return
        moved = {edit.step, edit.other}
        # The engine edits what enters a run as the latents of step 0; without that step they are those of step 1.
        entry = LatentsAt(1) if edit.edit == "drop" and edit.step == 0 else None
        for name, part in self.built.items():
            points = part.points(geometry)
            steps = {p.step for p in points} | {getattr(part, "step", -1)}
            if part.schedule is None and (moved & steps or entry in points):
                raise NoSuchSiteError(
                    f"part {name} acts at a step that {edit.edit} of step {edit.step} moves, takes out or takes twice, "
                    f"so it would not act once: choose another step for one of them"
                )


def _taken(fields: Mapping[str, Any]) -> list[str]:
    """Return which index fields a part has from the compose: required ones it leaves out, and those it says so of."""
    known = KINDS[fields["kind"]].model_fields
    return [
        index
        for index in INDEXES
        if fields.get(index) == SHARED or (index in known and known[index].is_required() and index not in fields)
    ]


@lru_cache(maxsize=1024)
def _built(compose: Compose) -> dict[str, Intervention]:
    """Build the parts; they follow from the fields, so they are no field of their own."""
    found: dict[str, Intervention] = {}
    for name, pairs in compose.parts:
        fields = dict(pairs)
        for index in _taken(fields):
            if getattr(compose, index) is None:
                raise ValueError(f"part {name} needs {index}: give it to the part, or beside parts to sweep it")
            fields[index] = getattr(compose, index)
        try:
            found[name] = KINDS[str(fields["kind"])].model_validate(fields, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = f"{first['loc'][0]}: " if first["loc"] else ""
            raise ValueError(f"part {name}: {where}{first['msg'].removeprefix('Value error, ')}") from None
    return found


@lru_cache(maxsize=64)
def _acting(compose: Compose, geometry: Geometry) -> dict[Point, tuple[str, ...]]:
    """Return the names of the parts that act at each point, in order."""
    found: dict[Point, tuple[str, ...]] = {}
    for name, part in compose.built.items():
        for point in dict.fromkeys(part.points(geometry)):
            found[point] = (*found.get(point, ()), name)
    return found
