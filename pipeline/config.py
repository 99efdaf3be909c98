"""The sweep config: YAML to frozen models, with every error at once, its line, key path and what is allowed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from cluster.notice import watch_for
from pipeline import metrics as _metrics  # noqa: F401  (registers every metric)
from pipeline import tasks as _tasks  # noqa: F401  (registers every task)
from pipeline.experiment import Experiment, ExperimentError, Problem, parse, unknown
from pipeline.metrics.metric import METRICS
from pipeline.permissions import FUNCTION
from pipeline.redaction import credentials_in
from pipeline.tasks.task import TASKS, Sampler, Task
from pipeline.wording import named, shortened, shown
from pipeline.yaml_source import Loc, SourceError, line_of, read_file, read_value

MOST_PROBLEMS, LONGEST_TEXT = 50, 1000
"""Of one message: more than anybody reads means that the file is of another kind."""


class ConfigError(ValueError):
    """A config that cannot be used; the message has one line for each problem."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Frozen):
    """Which model, in which precision.

    ``id`` is an embedded model, a diffusers folder or a hub name. ``device_map`` spreads the parts of a pipeline over
    the GPUs of one replica.
    """

    id: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_map: Literal["none", "balanced"] = "none"


AUTO = "auto"
DEFAULT_ROWS = 18


def _number_of_rows(value: Any) -> Any:
    if value == AUTO or (type(value) is int and value >= 1):
        return value
    raise ValueError("use a whole number from 1 on, or auto")


class EngineConfig(_Frozen):
    """What may change results in their last digits, and therefore belongs to the config's identity.

    ``batch_rows`` may be "auto": the number is then chosen once and kept in the store, see ``pipeline.batching``.
    ``mode`` "naive" is the reference: one row a forward, every run from its first step, nothing shared. ``engine:
    naive`` is short for it.
    """

    mode: Literal["replay", "naive"] = "replay"
    batch_rows: Annotated[
        int | Literal["auto"], PlainValidator(_number_of_rows), Field(description="rows of one denoiser forward")
    ] = DEFAULT_ROWS
    threads: Annotated[int, Field(ge=1, description="CPU threads of a replica")] = 1

    @model_validator(mode="before")
    @classmethod
    def _mode_alone(cls, data: Any) -> Any:
        return {"mode": data} if isinstance(data, str) else data


class PreviewConfig(_Frozen):
    """Which samples keep decoded clean estimates, and which intervention the patched film strip shows."""

    samples: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    patched: dict[str, Any] = Field(default_factory=dict)


class RunConfig(_Frozen):
    """Where and how a sweep runs; never changes a result."""

    replicas: Annotated[int, Field(ge=0, description="0 runs in this process, without Ray")] = 2
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    cpus_per_replica: Annotated[float, Field(ge=0)] = 1.0
    max_attempts: Annotated[int, Field(ge=1, description="tries before a unit is parked with its error")] = 3
    max_restarts: Annotated[int, Field(ge=0, description="deaths in a row of one replica")] = 5
    start_timeout_s: Annotated[float, Field(gt=0, description="to load the model, once a place is found")] = 1800.0
    capacity_wait_s: Annotated[float, Field(ge=0, description="for nodes that can hold a replica to come")] = 25.0
    lease_s: Annotated[float, Field(gt=0, description="a unit may run; its replica counts as hung after it")] = 3600.0
    straggler_factor: Annotated[float, Field(ge=0, description="times the expected time; 0 copies no unit")] = 3.0
    idle_release_s: Annotated[float, Field(ge=0, description="before a replica without work gives up its GPU")] = 60.0
    drain_s: Annotated[float, Field(ge=0, le=1e6, description="for units in flight when the sweep is told to stop")] = (
        120.0
    )
    notices: Annotated[
        tuple[str, ...], Field(description="where a node learns that it will go: aws, gcp, azure, or file:PATH")
    ] = ()


class SweepConfig(_Frozen):
    """A whole sweep. ``run`` is left out of the identity hash; everything else is in it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    model: ModelConfig
    task: dict[str, Any]
    sampler: Sampler = Sampler()
    engine: EngineConfig = EngineConfig()
    metrics: Annotated[tuple[str, ...], Field(min_length=1)]
    experiments: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    previews: PreviewConfig = PreviewConfig()
    unit_cells: Annotated[int, Field(ge=1, description="cells a unit should reach")] = 180
    run: RunConfig = RunConfig()

    def build_task(self) -> Task:
        """Return the validated task."""
        return TASKS[self.task["name"]](**self.task)

    def build_experiments(self) -> list[Experiment]:
        """Return the experiments in config order."""
        return [parse(name, raw) for name, raw in self.experiments.items()]

    def identity(self) -> dict[str, Any]:
        """Return everything that can change a result, JSON-able, with defaults filled in."""
        data = self.model_dump(mode="json", exclude={"run"})
        data["task"] = self.build_task().identity()
        for where in ("device", "device_map"):
            data["model"].pop(where)
        if self.engine.mode == "replay":
            # Younger than the first stores.
            data["engine"].pop("mode")
        if sources := {name: METRICS[name].source for name in self.metrics if METRICS[name].source}:
            # A function that has changed since gives other results.
            data["metric_sources"] = sources
        return data

    def hash(self) -> str:
        """Return the sha256 of the canonical JSON of ``identity``."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def load_config(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a config file, apply ``a.b=value`` overrides, validate.

    Raises
    ------
    ConfigError : one line for each problem, ``file:line: key.path: what is wrong and what is allowed``.
    """
    try:
        raw, lines = read_file(path)
    except SourceError as error:
        raise ConfigError(str(error)) from error
    for text in overrides:
        _override(raw, text)
    return validate(raw, lines, str(path), overridden_keys(overrides))


def overridden_keys(overrides: Sequence[str]) -> set[Loc]:
    """Return the key paths that ``--set`` overrides change."""
    return {tuple(text.partition("=")[0].strip().split(".")) for text in overrides}


def validate(
    raw: Mapping[str, Any], lines: Mapping[Loc, int], name: str, overridden: set[Loc] | None = None
) -> SweepConfig:
    """Validate raw settings; see ``load_config``."""
    config: SweepConfig | None = None
    problems: list[Problem] = []
    try:
        config = _strictly(SweepConfig, raw)
    except ValidationError as error:
        problems += _translate(error, SweepConfig, ())
    problems += _task_problems(raw.get("task"))
    problems += _metric_problems(raw)
    problems += _device_problems(config)
    problems += _notice_problems(config)
    problems += _credential_problems(raw)
    problems += _experiment_problems(raw.get("experiments"))
    problems += _precision_problems(config)
    if problems or config is None:
        raise ConfigError(format_problems(problems, lines, name, overridden or set()))
    return config


def format_problems(
    problems: Sequence[Problem], lines: Mapping[Loc, int], name: str, overridden: set[Loc] | None = None
) -> str:
    """Format problems one a line, in the order of the file."""
    rows = []
    for loc, text in problems:
        line = line_of(loc, dict(lines))
        by_option = any(loc[: len(o)] == o for o in overridden or ())
        place = "--set" if by_option else f"{name}:{line}" if line else name
        rows.append((line or 0, f"{place}: {named(*loc) if loc else 'config'}: {shortened(text, LONGEST_TEXT)}"))
    texts = [text for _, text in sorted(dict.fromkeys(rows))]
    if len(texts) > MOST_PROBLEMS:
        texts[MOST_PROBLEMS:] = [f"{name}: {len(texts) - MOST_PROBLEMS} more problems are not listed"]
    return "\n".join(texts)


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set {text!r}: expected key.path=value, for example --set sampler.steps=10")
    node: Any = raw
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {text!r}: {part} is {shown(node)}, not a mapping, so {key} cannot be set in it")
    try:
        node[path[-1]] = read_value(value)
    except SourceError as error:
        reason = str(error).partition(": ")[2]
        raise ConfigError(f"--set {text!r}: {reason}") from error


def _task_problems(raw: Any) -> list[Problem]:
    if not isinstance(raw, dict):
        return []  # the type error is reported by the main model
    if "name" not in raw:
        return [(("task",), f"name is missing; allowed: {', '.join(TASKS)}")]
    if not _known_task(raw["name"]):
        return [(("task", "name"), unknown("task", raw["name"], TASKS))]
    try:
        _strictly(TASKS[raw["name"]], raw)
    except ValidationError as error:
        return _translate(error, TASKS[raw["name"]], ("task",))
    return []


def _known_task(name: Any) -> bool:
    return isinstance(name, str) and name in TASKS


def _metric_problems(raw: Mapping[str, Any]) -> list[Problem]:
    names, task = raw.get("metrics"), raw.get("task")
    task_name = task.get("name") if isinstance(task, dict) else None
    if not isinstance(names, list):
        return []
    # An unknown task is reported by itself; it must not make every metric unknown as well.
    known = [n for n, m in METRICS.items() if not _known_task(task_name) or m.defined_for(str(task_name))]
    found: list[Problem] = [
        (("metrics", i), _not_allowed(n) if FUNCTION.fullmatch(n) else unknown("metric", n, known))
        for i, n in enumerate(names)
        if isinstance(n, str) and n not in known
    ]
    if len(set(map(str, names))) != len(names):
        found.append((("metrics",), f"a metric is listed twice: {shown(names)}"))
    return found


def _not_allowed(name: str) -> str:
    text = f"{shown(name)} is a function of the user's own, and a config alone may not run code"
    return f"{text}; if you trust it, add to the command: --allow-metric {shortened(name)}"


def _device_problems(config: SweepConfig | None) -> list[Problem]:
    if config is None:
        return []
    found: list[Problem] = []
    gpus = config.run.gpus_per_replica
    if gpus > 1 and not gpus.is_integer():
        # Ray refuses it too, but only once the first replica is asked for.
        found.append((("run", "gpus_per_replica"), f"use a share of one GPU or whole ones, got {gpus:g}"))
    if config.model.device_map == "none":
        return found
    if config.model.device == "cpu":
        found.append((("model", "device_map"), "balanced spreads a pipeline over GPUs, and device is cpu"))
    if config.run.replicas and config.run.gpus_per_replica < 2:
        text = f"balanced needs run.gpus_per_replica of 2 or more, got {config.run.gpus_per_replica:g}"
        found.append((("model", "device_map"), text))
    return found


def _notice_problems(config: SweepConfig | None) -> list[Problem]:
    found: list[Problem] = []
    for i, name in enumerate(config.run.notices if config is not None else ()):
        try:
            watch_for([name])
        except ValueError as error:
            found.append((("run", "notices", i), str(error)))
    return found


def _credential_problems(raw: Any, loc: Loc = ()) -> list[Problem]:
    """Return where a config holds a credential: it would go into the store's attributes."""
    if isinstance(raw, Mapping):
        found = [problem for key, value in raw.items() for problem in _credential_problems(value, (*loc, key))]
        return found + [problem for key in raw for problem in _credential_problems(key, loc)]
    if isinstance(raw, list):
        return [problem for i, value in enumerate(raw) for problem in _credential_problems(value, (*loc, i))]
    if isinstance(raw, str) and (what := credentials_in(raw)):
        return [(loc, f"holds {what}, which would be kept with the results; give it through the environment instead")]
    return []


RESERVED = ("samples", "baseline", "previews", "effects")
_GROUP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def _experiment_problems(raw: Any) -> list[Problem]:
    problems: list[Problem] = []
    for name, entry in raw.items() if isinstance(raw, dict) else ():
        if name in RESERVED or not _GROUP_NAME.fullmatch(name):
            allowed = f"letters, digits, _ and -, a letter or digit first, and none of {', '.join(RESERVED)}"
            problems.append((("experiments", name), f"an experiment cannot be named {shown(name)}; use {allowed}"))
        if not isinstance(entry, dict):
            continue  # the type error is reported by the main model
        try:
            parse(name, entry)
        except ExperimentError as error:
            problems += error.problems
    return problems


def _precision_problems(config: SweepConfig | None) -> list[Problem]:
    """Return where a precision is asked of a metric that is not computed, or has no one interval."""
    found: list[Problem] = []
    for name, entry in config.experiments.items() if config is not None else ():
        given = entry.get("precision")
        metric = given.get("metric") if isinstance(given, dict) else None
        if config is not None and isinstance(metric, str) and metric not in config.metrics:
            text = unknown("metric of this config", metric, config.metrics)
            found.append((("experiments", name, "precision", "metric"), text))
        elif isinstance(metric, str) and metric in METRICS and METRICS[metric].dims:
            text = f"{metric} is a field over {', '.join(METRICS[metric].dims)}; use a metric of one number"
            found.append((("experiments", name, "precision", "metric"), text))
    return found


M = TypeVar("M", bound=BaseModel)


def _strictly(model: type[M], raw: Mapping[str, Any]) -> M:
    # Strict JSON mode: no "3" or true for 3, but lists for tuples.
    return model.model_validate_json(json.dumps(raw), strict=True)


_PLAIN_WORDS = {
    "model_type": "expected a mapping of settings",
    "dict_type": "expected a mapping of settings",
    "tuple_type": "expected a list",
    "too_short": "give at least one",
}


def _translate(error: ValidationError, model: type[BaseModel], prefix: Loc) -> list[Problem]:
    problems: list[Problem] = []
    for item in error.errors():
        loc: Loc = (*prefix, *item["loc"])
        if item["type"] == "extra_forbidden":
            text = unknown("key", item["loc"][-1], _fields_at(model, item["loc"][:-1]))
        elif item["type"] == "missing":
            loc, text = loc[:-1], f"{item['loc'][-1]} is missing"
        elif item["type"] == "too_short" and item["input"]:
            continue  # pydantic does not count items that it refuses one by one
        else:
            words = _PLAIN_WORDS.get(item["type"]) or item["msg"].removeprefix("Value error, ")
            text = f"{words}, got {shown(item['input'])}"
        problems.append((loc, text))
    return problems


def _fields_at(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    for part in (part for part in loc if isinstance(part, str)):
        info = model.model_fields.get(part)
        inner = (info.annotation, *get_args(info.annotation)) if info is not None else ()
        nested = [a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
