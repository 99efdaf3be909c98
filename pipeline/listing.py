"""What the package knows, as lines of text: models and families, tasks and metrics, intervention kinds."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from interventions.base import KINDS, Intervention, index_fields
from interventions.families.family import FAMILIES, Blocks, Family
from pipeline.embedded.planted import PLANTED
from pipeline.experiment import unknown
from pipeline.metrics.metric import METRICS
from pipeline.models import EMBEDDED, describe
from pipeline.tasks.task import TASKS


class UnknownKindError(ValueError):
    """No intervention kind of that name."""


def models() -> Iterator[str]:
    """Yield the embedded models, then every family with its pipelines and where it can be read and edited."""
    for name in EMBEDDED:
        info = describe(name)
        pipeline, blocks = info.pipeline_config["_class_name"], info.denoiser_config["num_layers"]
        yield f"{name}: {pipeline}, {blocks} blocks, in this package"
    for family in sorted(FAMILIES.values(), key=lambda f: f.name):
        yield f"family {family.name}: {family.title or family.name}"
        yield f"  pipelines: {', '.join(family.pipelines)}"
        yield from (f"  sites: {_sites(blocks, family)}" for blocks in family.blocks)
        if family.notes:
            yield f"  note: {family.notes}"
    yield "planted models, from pipeline.embedded.planted.PLANTED, each with a mechanism that is known by construction:"
    yield from (f"  {planted.name}: {planted.mechanism}" for planted in PLANTED.values())


def _sites(blocks: Blocks, family: Family) -> str:
    which = "" if blocks.at == slice(None) else f"[{blocks.at.start or ''}:{blocks.at.stop or ''}]"
    found = [f"{family.denoiser}.{blocks.path}{which}: {', '.join(blocks.components) or 'no video tokens'}"]
    heads = [c for c in blocks.components if f"{c}.heads" in blocks.taps]
    text = [key.removesuffix(".text") for key in blocks.taps if key.endswith(".text")]
    for what, where in (("heads of", heads), ("text in", text), ("cuts in", list(blocks.attention))):
        if where:
            found.append(f"{what} {', '.join(where)}")
    return "; ".join(found)


def tasks() -> Iterator[str]:
    """Yield the tasks with their settings, then the metrics."""
    for name, cls in TASKS.items():
        yield f"{name}: {cls.summary}"
        for key, info in cls.model_fields.items():
            yield f"  {key} = {'required' if info.is_required() else repr(info.default)}"
    yield "metrics:"
    for metric in METRICS.values():
        field = f"; a field over {', '.join(metric.dims)}" if metric.dims else ""
        yield f"  {metric.name} ({', '.join(metric.tasks) or 'any task'}{field}): {metric.description}"


def interventions(kind: str | None = None) -> Iterator[str]:
    """Yield every kind with its sentence and formula, or one kind with its settings and an example too.

    Raises
    ------
    UnknownKindError : there is no such kind.
    """
    if kind is None:
        for name in sorted(KINDS):
            yield from _summary(name, KINDS[name])
        yield "Settings and an example of one: stepscope interventions KIND"
        return
    if kind not in KINDS:
        raise UnknownKindError(unknown("intervention", kind, sorted(KINDS)))
    cls = KINDS[kind]
    yield from _summary(kind, cls)
    marks = index_fields(cls)
    for key, info in cls.model_fields.items():
        if key != "kind":
            default = "required" if info.is_required() else f"default {info.default!r}"
            swept = f", index along {marks[key].coordinate}" if key in marks else ""
            yield f"  {key}: {type_name(info.annotation)}, {default}{swept}"
    yield "  example:"
    yield from (f"    {line}" for line in cls.example.splitlines())


def _summary(name: str, cls: type[Intervention]) -> Iterator[str]:
    yield f"{name}: {(cls.__doc__ or '').strip().splitlines()[0]}"
    yield f"  formula: {cls.formula}"


def type_name(annotation: Any) -> str:
    """Return a type as a user would write it: choices by their names, an optional value by what it may be."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return type_name(get_args(annotation)[0])
    if origin is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if origin in (Union, UnionType):
        return " | ".join(type_name(a) for a in get_args(annotation) if a is not NoneType)
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
