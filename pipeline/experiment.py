"""An experiment: one intervention kind with some fields fixed and the others swept as axes of a grid."""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from interventions import kinds as _kinds  # noqa: F401  (registers every kind)
from interventions.base import KINDS, Indexes, Intervention, index_fields
from interventions.kinds.patch import Patch
from interventions.screen import NotScreenableError, require_screenable
from interventions.sites import Geometry, NoSuchSiteError
from pipeline.precision import Precision
from pipeline.screening import Screen
from pipeline.wording import LONGEST, shown
from pipeline.yaml_source import Loc

_SLICE = re.compile(r"((?:-?[0-9]+)?):((?:-?[0-9]+)?)(?::0*([1-9][0-9]*))?", re.ASCII)
MOST_CELLS = 1_000_000
"""Cells of one experiment and sample, each of which is built and checked before anything runs."""
AXIS_ORDER = ("step", "layer", "component", "head", "frame")
"""Axes that come first, in this order; units are cut along the very first, so that a unit shares few steps."""

Problem = tuple[Loc, str]
"""Where in the config something is wrong, and what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A validated experiment whose index ranges may still be open ("all" or a slice).

    Attributes
    ----------
    name : group in the store.
    kind : intervention kind.
    fixed : field values equal for all cells.
    axes : swept fields with their values, in array order; a string is an open range along a coordinate.
    screen : how its cells are screened, None if every cell is computed.
    precision : until when a cell is computed for more samples, None for all of them.
    """

    name: str
    kind: str
    fixed: tuple[tuple[str, Any], ...]
    axes: tuple[tuple[str, tuple[Any, ...] | str], ...]
    screen: Screen | None = None
    precision: Precision | None = None

    @property
    def cls(self) -> type[Intervention]:
        """The intervention class."""
        return KINDS[self.kind]

    def bind(self, geometry: Geometry, *, checked: bool = False) -> Grid:
        """Resolve open ranges against a model and check every index and every cell, unless they are known to be good.

        Raises
        ------
        ExperimentError : with every problem found, each naming the key and the range.
        """
        problems: list[Problem] = []
        fields = index_fields(self.cls)
        axes: list[tuple[str, tuple[Any, ...]]] = []
        for name, values in self.axes:
            if isinstance(values, str):
                values = _resolve(values, self._starts(name, geometry))
                if not values:
                    problems.append(((name,), f"selects nothing of {_range(geometry, fields[name].coordinate)}"))
            axes.append((name, tuple(values)))
        for name, values in [*axes, *((n, (v,)) for n, v in self.fixed)]:
            problems += _out_of_range(name, values, fields, geometry)
        grid = Grid(experiment=self, geometry=geometry, axes=tuple(axes))
        if grid.cells > MOST_CELLS:
            problems.append(
                ((), f"{grid.cells:,} cells a sample; an experiment has at most {MOST_CELLS:,}: sweep less")
            )
        if not problems and not checked:
            problems = grid.check()
        if problems:
            raise ExperimentError([(("experiments", self.name, *loc), text) for loc, text in problems])
        return grid

    def _starts(self, name: str, geometry: Geometry) -> tuple[int, ...]:
        """Return the indices at which "all" starts: those from which the longest window stays inside."""
        mark = index_fields(self.cls)[name]
        given = dict(self.fixed).get(mark.window) or 1
        longest = max([given, *dict(self.axes).get(mark.window, ())])
        indices = geometry.indices(mark.coordinate)
        return indices[: max(0, len(indices) - longest + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """An experiment on a known geometry: every axis has its values, every cell its intervention."""

    experiment: Experiment
    geometry: Geometry
    axes: tuple[tuple[str, tuple[Any, ...]], ...]

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the axes, in array order."""
        return tuple(name for name, _ in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        return tuple(len(values) for _, values in self.axes)

    @property
    def cells(self) -> int:
        """Cells of one sample."""
        return math.prod(self.shape)

    def intervention(self, index: tuple[int, ...]) -> Intervention:
        """Return the intervention of one cell by its position along each axis."""
        values = {name: values[i] for (name, values), i in zip(self.axes, index, strict=True)}
        return self.experiment.cls(kind=self.experiment.kind, **dict(self.experiment.fixed), **values)

    def interventions(self, lead: range | None = None) -> Iterator[Intervention]:
        """Yield interventions in C order, optionally for a window of the first axis only."""
        ranges = [range(n) for n in self.shape]
        if lead is not None and ranges:
            ranges[0] = lead
        for index in itertools.product(*ranges):
            yield self.intervention(index)

    def readers(self) -> Iterator[Intervention]:
        """Yield cells that between them read every recorded run that any cell does: sites do not matter for that."""
        marks = index_fields(self.experiment.cls)
        for index in itertools.product(*(range(1 if name in marks else len(v)) for name, v in self.axes)):
            yield self.intervention(index)

    def check(self) -> list[Problem]:
        """Build every cell once and return what the kind's own rules refuse, each rule once."""
        found: dict[str, Problem] = {}
        for index in itertools.product(*(range(n) for n in self.shape)):
            try:
                cell = self.intervention(index)
                cell.check(self.geometry)
                if self.experiment.screen is not None and isinstance(cell, Patch):
                    require_screenable(cell)
            except ValidationError as error:
                for item in error.errors():
                    text = item["msg"].removeprefix("Value error, ")
                    found.setdefault(text, (tuple(item["loc"]), text))
            except NoSuchSiteError as error:
                found.setdefault("", ((), str(error)))
            except NotScreenableError as error:
                found.setdefault("screen", (("screen",), str(error)))
        return list(found.values())


class ExperimentError(ValueError):
    """One or more problems in experiments, each with its key path."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, loc))}: {text}" for loc, text in problems))
        self.problems = problems


def parse(name: str, raw: Any) -> Experiment:
    """Validate one entry of ``experiments``.

    Raises
    ------
    ExperimentError : with every problem found.
    """
    where: Loc = ("experiments", name)
    if not isinstance(raw, dict):
        raise ExperimentError([(where, f"expected a mapping with `kind`, got {shown(raw)}")])
    kind = raw.get("kind")
    if kind is None:
        raise ExperimentError([(where, f"kind is missing; allowed: {', '.join(KINDS)}")])
    if not isinstance(kind, str) or kind not in KINDS:
        raise ExperimentError([((*where, "kind"), unknown("intervention", kind, KINDS))])
    cls = KINDS[kind]
    problems: list[Problem] = []
    fixed: dict[str, Any] = {}
    axes: dict[str, tuple[Any, ...] | str] = {}
    screen = _screen(raw["screen"], kind, (*where, "screen"), problems) if raw.get("screen") is not None else None
    precision = _precision(raw, (*where, "precision"), problems) if raw.get("precision") is not None else None
    for field, value in raw.items():
        if field in ("kind", "screen", "precision"):
            continue
        if field not in cls.model_fields:
            problems.append(((*where, field), unknown("key", field, [f for f in cls.model_fields if f != "kind"])))
        elif isinstance(value, str) and field in index_fields(cls) and (value == "all" or _SLICE.fullmatch(value)):
            axes[field] = value
        elif isinstance(value, list) and field == "parts":
            problems.append(((*where, field), "parts is one mapping; make an experiment for each, or sweep beside it"))
        elif isinstance(value, list):
            axes[field] = tuple(_checked(cls, field, v, (*where, field, i), problems) for i, v in enumerate(value))
            problems += _list_problems(value, (*where, field))
        else:
            fixed[field] = _checked(cls, field, value, (*where, field), problems)
    for field, info in cls.model_fields.items():
        if info.is_required() and field not in raw:
            problems.append(
                (where, f"{field} is missing; example:\n{cls.example}" if cls.example else f"{field} is missing")
            )
    if problems:
        raise ExperimentError(problems)
    # The order of the kind's fields, not of the file: two files with one hash must lay out one array.
    order = [*AXIS_ORDER, *(f for f in cls.model_fields if f not in AXIS_ORDER)]
    ordered = sorted(axes.items(), key=lambda item: order.index(item[0]))
    return Experiment(
        name=name, kind=kind, fixed=tuple(fixed.items()), axes=tuple(ordered), screen=screen, precision=precision
    )


def _screen(raw: Any, kind: str, loc: Loc, problems: list[Problem]) -> Screen | None:
    # Importing a metric imports every task.
    from pipeline.metrics.objective import OBJECTIVES

    if kind != "patch":
        problems.append((loc, f"only experiments of kind patch can be screened, this one is of kind {kind}"))
        return None
    if not isinstance(raw, dict):
        problems.append((loc, f"expected a mapping such as {{top: 0.1, metric: clean_projection}}, got {shown(raw)}"))
        return None
    if isinstance(raw.get("metric"), str) and raw["metric"] not in OBJECTIVES:
        problems.append(((*loc, "metric"), unknown("differentiable metric", raw["metric"], OBJECTIVES)))
    return _settings(Screen, raw, loc, problems)


def _precision(raw: dict[str, Any], loc: Loc, problems: list[Problem]) -> Precision | None:
    given, cls = raw["precision"], KINDS[raw["kind"]]
    if not isinstance(given, dict):
        problems.append((loc, f"expected a mapping such as {{half_width: 0.05, metric: NAME}}, got {shown(given)}"))
        return None
    if raw.get("screen") is not None:
        problems.append(
            (loc, "an experiment is screened or computed to a precision, not both; make it two experiments")
        )
    if given.get("by") == "recovery" and not cls.contrast:
        problems.append(((*loc, "by"), f"cells of kind {raw['kind']} have no recovery; use difference"))
    return _settings(Precision, given, loc, problems)


S = TypeVar("S", bound=BaseModel)


def _settings(model: type[S], raw: dict[str, Any], loc: Loc, problems: list[Problem]) -> S | None:
    try:
        return model.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        for item in error.errors():
            if item["type"] == "extra_forbidden":
                text = unknown("key", item["loc"][-1], model.model_fields)
            else:
                text = item["msg"] if item["type"] == "missing" else f"{item['msg']}, got {shown(item['input'])}"
            problems.append(((*loc, *item["loc"]), text))
        return None


def unknown(what: str, value: Any, known: Any) -> str:
    """Say that a name is not known, with the nearest one or all of them."""
    names = [str(k) for k in known]
    near = difflib.get_close_matches(str(value)[:LONGEST], names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {shown(value)}: {hint}allowed: {', '.join(names)}"


def _checked(cls: type[Intervention], field: str, value: Any, loc: Loc, problems: list[Problem]) -> Any:
    try:
        return _adapter(cls, field).validate_python(value, strict=True)
    except ValidationError as error:
        allowed = f"; a list sweeps it{', `all` or a slice such as `2:8` too' if field in index_fields(cls) else ''}"
        problems.append((loc, f"{_first_message(error)}, got {shown(value)}{allowed}"))
        return value


@functools.cache
def _adapter(cls: type[Intervention], field: str) -> TypeAdapter[Any]:
    info = cls.model_fields[field]
    annotation: Any = info.annotation
    for mark in info.metadata:
        annotation = Annotated[annotation, mark]
    return TypeAdapter(annotation)


def _first_message(error: ValidationError) -> str:
    items = [item for item in error.errors() if item["type"] != "none_required"]
    messages = dict.fromkeys(item["msg"] for item in items)
    return " or ".join(messages)


def _list_problems(values: list[Any], loc: Loc) -> list[Problem]:
    if not values:
        return [(loc, "an empty list sweeps nothing; give at least one value")]
    if None in values:
        return [(loc, "null cannot be swept; leave the key out, in an experiment of its own")]
    if len({repr(v) for v in values}) != len(values):
        return [(loc, f"a value is listed twice: {shown(values)}")]
    return []


def _resolve(text: str, indices: tuple[int, ...]) -> tuple[int, ...]:
    if text == "all" or not indices:
        return indices
    match = _SLICE.fullmatch(text)
    assert match is not None
    start, stop, stride = (int(g) if g else None for g in match.groups())
    # A slice is in the coordinate's own numbers: "1:" keeps indices from 1 on, "-3:" the last three.
    last = indices[-1] + 1
    low = indices[0] if start is None else start if start >= 0 else last + start
    high = last if stop is None else stop if stop >= 0 else last + stop
    kept = [i for i in indices if low <= i < high]
    return tuple(kept[:: stride or 1])


def _out_of_range(name: str, values: Any, fields: dict[str, Indexes], geometry: Geometry) -> list[Problem]:
    if name == "component":
        bad = [v for v in values if v not in geometry.components]
        return [((name,), unknown("component", v, geometry.components)) for v in bad]
    if name == "branch":
        known = (*geometry.branches, "both")
        return [
            ((name,), f"branch {v!r} is not computed by this sampler; it has {', '.join(known)}")
            for v in values
            if v not in known
        ]
    if name not in fields:
        return []
    coordinate = fields[name].coordinate
    legal = geometry.indices(coordinate)
    return [
        ((name,), f"{v} is out of range; this model and sampler have {_range(geometry, coordinate)}")
        for v in values
        if v is not None and v not in legal
    ]


def _range(geometry: Geometry, coordinate: str) -> str:
    legal = geometry.indices(coordinate)
    given = "frame 0 is" if legal and legal[0] == 1 else f"frames 0 to {legal[0] - 1} are" if legal else ""
    note = f" ({given} given)" if coordinate == "frame" and legal and legal[0] else ""
    return f"{coordinate}s {legal[0]} to {legal[-1]}{note}" if legal else f"no {coordinate}s"
