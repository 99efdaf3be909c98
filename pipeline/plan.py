"""The plan: every unit of a sweep, how its cells are batched, and what it will cost, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from interventions.base import Intervention
from interventions.run import loop_order, replayed_loops
from interventions.sites import RUNS, Geometry, Site
from pipeline.config import ConfigError, SweepConfig, format_problems, overridden_keys
from pipeline.experiment import Experiment, ExperimentError, Grid, Problem, parse
from pipeline.metrics.metric import METRICS, Metric
from pipeline.models import ModelError, ModelInfo, describe
from pipeline.samples import Sample
from pipeline.tasks.task import Task
from pipeline.yaml_source import Loc, SourceError, read_file

BASELINE = "baseline"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What one replica computes and writes together: whole chunks of one group.

    Attributes
    ----------
    id : number in the sweep. group : "baseline" or an experiment. index : position in the group's ``status``.
    sample : position along ``sample``. start, stop : window along the group's first axis.
    """

    id: int
    group: str
    index: int
    sample: int
    start: int = 0
    stop: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a plan computes and stores.

    Attributes
    ----------
    cells, units : counts over all samples. row_forwards : denoiser forwards of one row each.
    naive_row_forwards : the same for one full run a cell. bytes : uncompressed size of the results.
    """

    cells: int
    units: int
    row_forwards: int
    naive_row_forwards: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """A config bound to a model: geometry, samples, grids and units, all pure functions of the two."""

    config: SweepConfig
    model: ModelInfo
    task: Task
    geometry: Geometry
    grids: tuple[Grid, ...]
    patched: Intervention | None

    @cached_property
    def samples(self) -> list[Sample]:
        """Every sample, in store order."""
        return self.task.samples()

    @cached_property
    def metrics(self) -> list[Metric]:
        """The metrics, in config order."""
        return [METRICS[name] for name in self.config.metrics]

    @cached_property
    def by_name(self) -> dict[str, Grid]:
        """Grids by experiment name."""
        return {grid.experiment.name: grid for grid in self.grids}

    def window(self, grid: Grid) -> int:
        """Return how many positions of the first axis a unit of this grid takes."""
        if not grid.shape:
            return 1
        per_position = math.prod(grid.shape[1:])
        return min(grid.shape[0], max(1, round(self.config.unit_cells / per_position)))

    def windows(self, grid: Grid) -> int:
        """Return the number of units that one sample of a grid is cut into."""
        return math.ceil(grid.shape[0] / self.window(grid)) if grid.shape else 1

    def group_units(self, group: str) -> int:
        """Return the length of a group's ``status``."""
        return len(self.samples) * (1 if group == BASELINE else self.windows(self.by_name[group]))

    def units(self) -> Iterator[Unit]:
        """Yield every unit, all units of a sample together so that its recorded runs are reused."""
        number = 0
        for s in range(len(self.samples)):
            yield Unit(id=number, group=BASELINE, index=s, sample=s)
            number += 1
            for grid in self.grids:
                width, count = self.window(grid), self.windows(grid)
                for w in range(count):
                    stop = min((w + 1) * width, grid.shape[0] if grid.shape else 1)
                    yield Unit(
                        id=number, group=grid.experiment.name, index=s * count + w, sample=s, start=w * width, stop=stop
                    )
                    number += 1

    def unit_cells(self, unit: Unit) -> int:
        """Return the number of cells of a unit; a baseline has two, its runs."""
        if unit.group == BASELINE:
            return len(RUNS)
        return (unit.stop - unit.start) * math.prod(self.by_name[unit.group].shape[1:])

    def interventions(self, unit: Unit) -> list[Intervention]:
        """Return the interventions of a unit's cells, in C order."""
        grid = self.by_name[unit.group]
        return list(grid.interventions(range(unit.start, unit.stop)))

    def batches(self, rows: Sequence[Intervention]) -> list[list[int]]:
        """Return the batches of a unit's cells; see ``batch_rows``."""
        return batch_rows(rows, self.geometry, self.config.engine.batch_rows)

    def cost(self) -> Cost:
        """Count cells, forwards and bytes of the whole sweep."""
        n, branches = len(self.samples), len(self.geometry.branches)
        forwards = 2 * self.geometry.steps * branches
        cells = 0
        for grid in self.grids:
            cells += grid.cells
            for start in range(0, grid.shape[0] if grid.shape else 1, self.window(grid)):
                stop = min(start + self.window(grid), grid.shape[0] if grid.shape else 1)
                rows = list(grid.interventions(range(start, stop)))
                forwards += sum(self.batch_forwards([rows[i] for i in batch]) for batch in self.batches(rows))
        return Cost(
            cells=cells * n,
            units=sum(self.group_units(g) for g in (BASELINE, *self.by_name)),
            row_forwards=forwards * n,
            naive_row_forwards=(cells + 2) * n * self.geometry.steps * branches,
            bytes=4 * n * len(self.metrics) * (cells + 2 * (self.geometry.steps + 1)) + self._preview_bytes(),
        )

    def _preview_bytes(self) -> int:
        height, width = self.task.preview_size()
        frames = 3 * self.geometry.steps * self.geometry.frames
        return len(self.config.previews.samples) * frames * height * width * 3

    def batch_forwards(self, rows: Sequence[Intervention]) -> int:
        """Return the denoiser row-forwards of one batch, donor captures included."""
        branches = len(self.geometry.branches)
        sources = {
            (read.point.step, (ref.sample, ref.seed, ref.fixed))
            for row in rows
            for read in row.reads(self.geometry)
            if isinstance(read.point, Site)
            for ref in read.source
        }
        schedule = rows[0].schedule
        loops = len(loop_order(schedule, self.geometry.steps)) - replayed_loops(rows, schedule, self.geometry)
        return branches * (len(RUNS) * len(sources) + len(rows) * loops)


def batch_rows(rows: Sequence[Intervention], geometry: Geometry, limit: int) -> list[list[int]]:
    """Group rows that can share a forward: same schedule edit, same first computed step, at most ``limit`` rows.

    The result depends on the rows alone, so a unit's batches, and with them its last bits, are the same wherever
    and however often it runs.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((str(row.schedule), row.first_computed_step(geometry)), []).append(i)
    return [members[k : k + limit] for members in groups.values() for k in range(0, len(members), limit)]


def make_plan(config: SweepConfig, path: Path | None = None, overrides: Sequence[str] = ()) -> Plan:
    """Bind a config to its model.

    Parameters
    ----------
    path : the config file, to name lines in errors. overrides : the ``--set`` overrides that were applied to it.

    Raises
    ------
    ConfigError : a model that cannot be found or is of no known family, an index out of range, a cell that its
        kind refuses, or a preview that does not exist.
    """
    try:
        model = describe(config.model.id)
    except ModelError as error:
        raise _refusal([(("model", "id"), str(error))], path, overrides) from error
    task = config.build_task()
    geometry = model.geometry(task, config.sampler)
    problems: list[Problem] = []
    grids = []
    for experiment in config.build_experiments():
        try:
            grids.append(experiment.bind(geometry))
        except ExperimentError as error:
            problems += error.problems
    patched = _patched(config, geometry, problems)
    count = len(task.samples())
    problems += [
        (("previews", "samples", i), f"sample {s} does not exist; there are samples 0 to {count - 1}")
        for i, s in enumerate(config.previews.samples)
        if s >= count
    ]
    if len(set(config.previews.samples)) != len(config.previews.samples):
        problems.append((("previews", "samples"), f"a sample is listed twice: {list(config.previews.samples)}"))
    if problems:
        raise _refusal(problems, path, overrides)
    return Plan(config=config, model=model, task=task, geometry=geometry, grids=tuple(grids), patched=patched)


def _refusal(problems: list[Problem], path: Path | None, overrides: Sequence[str]) -> ConfigError:
    lines: dict[Loc, int] = {}
    if path is not None:
        with suppress(SourceError):
            lines = read_file(path)[1]
    return ConfigError(format_problems(problems, lines, str(path or "config"), overridden_keys(overrides)))


def _patched(config: SweepConfig, geometry: Geometry, problems: list[Problem]) -> Intervention | None:
    raw = config.previews.patched
    if not raw:
        return None
    try:
        experiment: Experiment = parse("patched", raw)
        grid = experiment.bind(geometry)
    except ExperimentError as error:
        problems += [(("previews", "patched", *loc[2:]), text) for loc, text in error.problems]
        return None
    if grid.cells != 1:
        problems.append((("previews", "patched"), f"describes {grid.cells} interventions; give exactly one"))
        return None
    return next(grid.interventions())
