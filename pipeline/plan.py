"""The plan: every unit of a sweep, how its cells are batched, and what it will cost, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from interventions.base import Intervention, RunRef
from interventions.run import loop_order, replayed_loops
from interventions.screen import PASSES
from interventions.sites import RUNS, Geometry, RunName, Site
from pipeline.call import argument_problems
from pipeline.config import DEFAULT_ROWS, ConfigError, SweepConfig, format_problems, overridden_keys
from pipeline.experiment import Experiment, ExperimentError, Grid, Problem, parse
from pipeline.fields import field_shape
from pipeline.layout import BASELINE as BASELINE
from pipeline.layout import Layout, Windows
from pipeline.layout import Unit as Unit
from pipeline.metrics.metric import METRICS, Metric
from pipeline.models import ModelError, ModelInfo, describe
from pipeline.permissions import NOTHING, Permissions
from pipeline.precision import NoRoundsError, Rounds
from pipeline.problems import Problems
from pipeline.samples import Sample
from pipeline.tasks.task import Task
from pipeline.wording import shown
from pipeline.yaml_source import Loc, SourceError, read_file

MOST_SAMPLES = 250_000
"""Samples of a sweep, which the driver keeps in memory."""


FIELD_CHUNK = 16 * 2**20
"""Bytes of a field that a unit should not exceed: they are one chunk, of which effects hold eight times as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a plan computes and stores.

    Attributes
    ----------
    cells, units : counts over all samples. estimates : cells of screened experiments, all of which get an estimate.
    row_forwards : denoiser forwards of one row each; with a screened experiment as if its cells lay evenly.
    least_cells, least_row_forwards : the same if every cell of a precise experiment stops at the first look.
    naive_row_forwards : the same for one full run a cell. bytes : uncompressed size of the results.
    """

    cells: int
    units: int
    row_forwards: int
    naive_row_forwards: int
    bytes: int
    estimates: int = 0
    least_cells: int = 0
    least_row_forwards: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowWork:
    """What the cells of one window of an experiment are: groups that share forwards, and row-forwards."""

    groups: int
    forwards: int


@dataclass(frozen=True)
class Plan:
    """A config bound to a model: geometry, samples, grids and units, all pure functions of the two.

    Attributes
    ----------
    auto_rows : rows of one forward where the config leaves them to the tool; batches and costs are counted with them.
    """

    config: SweepConfig
    model: ModelInfo
    task: Task
    geometry: Geometry
    grids: tuple[Grid, ...]
    patched: Intervention | None
    permissions: Permissions = NOTHING
    auto_rows: int = DEFAULT_ROWS

    @property
    def rows(self) -> int:
        """The most rows that share a forward."""
        if self.config.engine.mode == "naive":
            return 1
        given = self.config.engine.batch_rows
        return given if isinstance(given, int) else self.auto_rows

    def with_rows(self, rows: int) -> Plan:
        """Return the plan with rows of one forward that were chosen for it."""
        return replace(self, auto_rows=rows)

    @cached_property
    def samples(self) -> list[Sample]:
        """Every sample, in store order."""
        return self.task.samples()

    @cached_property
    def problems(self) -> Problems:
        """The samples by problem."""
        return Problems(self.samples)

    @cached_property
    def metrics(self) -> list[Metric]:
        """The metrics, in config order."""
        return [METRICS[name] for name in self.config.metrics]

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """(frames, height, width) of the latents."""
        return self.task.latent_shape(self.model)

    def field_shape(self, metric: Metric) -> tuple[int, ...]:
        """Return the shape of a metric's value in one cell; () for one number."""
        return field_shape(metric.dims, self.latent_shape) if metric.dims else ()

    @cached_property
    def by_name(self) -> dict[str, Grid]:
        """Grids by experiment name."""
        return {grid.experiment.name: grid for grid in self.grids}

    def window(self, grid: Grid) -> int:
        """Return how many positions of the first axis a unit of this grid takes."""
        if not grid.shape:
            return 1
        per_position = math.prod(grid.shape[1:]) * computed_cells(grid) / grid.cells
        width = round(self.config.unit_cells / per_position)
        if any(metric.dims for metric in self.metrics):
            largest = max(math.prod(self.field_shape(metric)) for metric in self.metrics)
            width = min(width, FIELD_CHUNK // (4 * largest * math.prod(grid.shape[1:])))
        return min(grid.shape[0], max(1, width))

    @cached_property
    def layout(self) -> Layout:
        """The units of the sweep, by number."""
        groups = tuple(
            Windows(
                group=grid.experiment.name,
                extent=grid.shape[0] if grid.shape else 1,
                width=self.window(grid),
                verifies=grid.experiment.screen is not None,
            )
            for grid in self.grids
        )
        return Layout(len(self.samples), groups, tuple(cut for r in self.rounds.values() for cut in r.samples))

    def group_units(self, group: str) -> int:
        """Return the length of a group's ``status``."""
        return self.layout.group_units(group)

    def units(self) -> Iterator[Unit]:
        """Yield every unit in the order in which they run; see ``Layout``."""
        return iter(self.layout)

    @property
    def screened(self) -> list[Grid]:
        """Grids whose cells are screened, then partly verified."""
        return [grid for grid in self.grids if grid.experiment.screen is not None]

    @cached_property
    def rounds(self) -> dict[str, Rounds]:
        """The rounds of every experiment that is computed to a precision."""
        settings = {grid.experiment.name: grid.experiment.precision for grid in self.grids}
        return {name: Rounds.of(given, self.samples) for name, given in settings.items() if given is not None}

    def verifies(self, unit: Unit) -> bool:
        """Whether a unit computes chosen cells of a screened grid."""
        return unit.group != BASELINE and self.by_name[unit.group].experiment.screen is not None

    def unit_cells(self, unit: Unit) -> int:
        """Return the number of cells of a unit, expected if they are yet to be chosen; a baseline has two, its runs."""
        if unit.group == BASELINE:
            return len(RUNS)
        return self.window_cells(unit.group, unit.start, unit.stop)

    def window_cells(self, group: str, start: int, stop: int) -> int:
        """Return the number of cells of a window, expected if they are yet to be chosen."""
        grid = self.by_name[group]
        return round((stop - start) * math.prod(grid.shape[1:]) * computed_cells(grid) / grid.cells)

    def unit_forwards(self, unit: Unit) -> int:
        """Return the row-forwards of a unit, expected if its cells are yet to be chosen; alike for every sample."""
        if unit.group == BASELINE:
            return 2 * self.geometry.steps * len(self.geometry.branches) + self.screening_forwards()
        return self.window_work(unit.group)[unit.start // self.window(self.by_name[unit.group])].forwards

    def window_work(self, group: str) -> list[WindowWork]:
        """Return the work of each window of an experiment, expected if its cells are yet to be chosen."""
        return self._window_work[group]

    def _group_forwards(self, group: str) -> int:
        return sum(work.forwards for work in self.window_work(group))

    @cached_property
    def _window_work(self) -> dict[str, list[WindowWork]]:
        return {
            name: [self._work_of(grid, *bounds) for bounds in self._bounds(grid)] for name, grid in self.by_name.items()
        }

    def _bounds(self, grid: Grid) -> list[tuple[int, int]]:
        windows = self.layout.windows(grid.experiment.name)
        return [windows.bounds(window) for window in range(windows.count)]

    def _work_of(self, grid: Grid, start: int, stop: int) -> WindowWork:
        rows = list(grid.interventions(range(start, stop)))
        rows = _spread(rows, computed_cells(grid) / grid.cells)
        forwards = sum(self.batch_forwards([rows[i] for i in batch]) for batch in self.batches(rows))
        return WindowWork(groups=len(self.groups(rows)), forwards=forwards)

    def interventions(self, unit: Unit) -> list[Intervention]:
        """Return the interventions of a unit's cells, in C order."""
        grid = self.by_name[unit.group]
        return list(grid.interventions(range(unit.start, unit.stop)))

    def batches(self, rows: Sequence[Intervention]) -> list[list[int]]:
        """Return the batches of a unit's cells; see ``batch_rows``."""
        return batch_rows(rows, self.geometry, self.rows)

    def groups(self, rows: Sequence[Intervention]) -> list[list[int]]:
        """Return which rows could share one forward, however many they are."""
        return batch_rows(rows, self.geometry, max(1, len(rows)))

    def cost(self) -> Cost:
        """Count cells, forwards and bytes of the whole sweep."""
        n, branches = len(self.samples), len(self.geometry.branches)
        forwards = 2 * self.geometry.steps * branches + self.screening_forwards()
        cells = stored = 0
        for grid in self.grids:
            cells, stored = cells + computed_cells(grid), stored + grid.cells
            forwards += self._group_forwards(grid.experiment.name)
        # Runs from other initial noise are nobody's baseline; those of other problems are recorded for their own.
        seeds = {
            (r.sample, r.seed) for g in self.grids for c in g.readers() for r in c.references(self.geometry) if r.seed
        }
        forwards += 2 * self.geometry.steps * branches * len(seeds)
        if self.screened:
            # A sample is recorded a second time, for its cells to be verified.
            forwards += 2 * self.geometry.steps * branches
        estimates = sum(grid.cells for grid in self.screened)
        saved = {name: n - rounds.samples[0] for name, rounds in self.rounds.items()}
        return Cost(
            cells=cells * n,
            units=len(self.layout),
            row_forwards=forwards * n,
            least_cells=cells * n - sum(k * self.by_name[name].cells for name, k in saved.items()),
            least_row_forwards=forwards * n - sum(k * self._group_forwards(name) for name, k in saved.items()),
            naive_row_forwards=(stored + 2) * n * self.geometry.steps * branches,
            bytes=4 * n * (sum(self._stored_values(metric, stored) for metric in self.metrics) + estimates)
            + self._preview_bytes(),
            estimates=estimates * n,
        )

    def _stored_values(self, metric: Metric, cells: int) -> int:
        """Return how many numbers of a metric a sample has; only one number a row is kept by step."""
        by_step = 0 if metric.dims else len(RUNS) * self.geometry.steps
        return math.prod(self.field_shape(metric)) * (cells + len(RUNS)) + by_step

    def screening_forwards(self) -> int:
        """Return the row-forwards of screening one sample, a backward counted as two."""
        steps = sum(len(dict(grid.axes).get("step", (0,))) for grid in self.screened)
        return PASSES * len(RUNS) * len(self.geometry.branches) * steps

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
        loops = len(loop_order(schedule, self.geometry.steps))
        if self.config.engine.mode == "naive":
            return branches * (len(RUNS) * sum(step + 1 for step, _ in sources) + len(rows) * loops)
        loops -= replayed_loops(rows, schedule, self.geometry)
        return branches * (len(RUNS) * len(sources) + len(rows) * loops)


def computed_cells(grid: Grid) -> int:
    """Return how many cells of one sample are computed rather than estimated."""
    screen = grid.experiment.screen
    return grid.cells if screen is None else screen.verified_cells(grid.cells)


def _spread(rows: list[Intervention], share: float) -> list[Intervention]:
    """Return a share of the rows, evenly spaced."""
    count = max(1, round(share * len(rows)))
    return [rows[i * len(rows) // count] for i in range(count)]


def batch_rows(rows: Sequence[Intervention], geometry: Geometry, limit: int) -> list[list[int]]:
    """Group rows that can share a forward: same schedule edit, same first computed step, at most ``limit`` rows.

    The result depends on the rows alone, so a unit's batches, and with them its last bits, are the same wherever
    and however often it runs.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((str(row.schedule), row.first_computed_step(geometry)), []).append(i)
    return [members[k : k + limit] for members in groups.values() for k in range(0, len(members), limit)]


def make_plan(
    config: SweepConfig,
    path: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    checked: bool = False,
    permissions: Permissions = NOTHING,
) -> Plan:
    """Bind a config to its model.

    Parameters
    ----------
    path : the config file, to name lines in errors. overrides : the ``--set`` overrides that were applied to it.
    checked : whether every cell is known to be good; a replica's config is the driver's, who has checked it.
    permissions : what the command line allowed.

    Raises
    ------
    ConfigError : more samples than a sweep may have, a model that cannot be found or is of no known family, an index
        out of range, a cell that its kind refuses, or a preview that does not exist.
    """
    task = config.build_task()
    if (count := task.count()) > MOST_SAMPLES:
        text = f"makes {count:,} samples; a sweep has at most {MOST_SAMPLES:,}: make several of it"
        raise _refusal([(("task",), text)], path, overrides)
    try:
        model = describe(config.model.id, pickled_weights=permissions.pickled_weights)
        unfit = [*task.problems(model, config.sampler), *_undecoded(config, task)]
        unfit += argument_problems(model, config.sampler.arguments, task.sets(model))
        if unfit:
            raise _refusal(unfit, path, overrides)
        geometry = model.geometry(task, config.sampler)
    except ModelError as error:
        raise _refusal([(("model", "id"), str(error))], path, overrides) from error
    problems: list[Problem] = []
    grids = []
    for experiment in config.build_experiments():
        try:
            grids.append(experiment.bind(geometry, checked=checked))
        except ExperimentError as error:
            problems += error.problems
    patched = _patched(config, geometry, problems)
    samples = task.samples() if not checked else []
    for grid in grids if not checked else ():
        problems += _unreadable(grid, samples) + _roundless(grid.experiment, samples)
    problems += [
        (("previews", "samples", i), f"sample {s} does not exist; there are samples 0 to {count - 1}")
        for i, s in enumerate(config.previews.samples)
        if s >= count
    ]
    if len(set(config.previews.samples)) != len(config.previews.samples):
        problems.append((("previews", "samples"), f"a sample is listed twice: {shown(list(config.previews.samples))}"))
    if problems:
        raise _refusal(problems, path, overrides)
    return Plan(
        config=config,
        model=model,
        task=task,
        geometry=geometry,
        grids=tuple(grids),
        patched=patched,
        permissions=permissions,
    )


def _refusal(problems: list[Problem], path: Path | None, overrides: Sequence[str]) -> ConfigError:
    lines: dict[Loc, int] = {}
    if path is not None:
        with suppress(SourceError):
            lines = read_file(path)[1]
    return ConfigError(format_problems(problems, lines, str(path or "config"), overridden_keys(overrides)))


def _undecoded(config: SweepConfig, task: Task) -> list[Problem]:
    """Return what asks for videos of a task that decodes none."""
    if task.decodes:
        return []
    problems: list[Problem] = [
        (("metrics", i), f"{name} is a metric of videos, and this task decodes none: leave it out, or decode them")
        for i, name in enumerate(config.metrics)
        if METRICS[name].reads_video
    ]
    if config.previews.samples:
        problems.append((("previews", "samples"), "previews are videos, and this task decodes none: set samples: []"))
    return problems


def _unreadable(grid: Grid, samples: Sequence[Sample]) -> list[Problem]:
    """Return what is wrong with the other runs that an experiment's cells read from."""
    problems, where = Problems(samples), ("experiments", grid.experiment.name)
    for cell in grid.readers():
        for ref in sorted(cell.references(grid.geometry), reverse=True):
            if ref.fixed and ref.sample >= len(problems):
                return [(where, f"reads {ref.sample + 1} or more reference problems; the task has {len(problems)}")]
            if not ref.fixed and ref.sample and ref.sample % len(problems) == 0:
                text = (
                    f"reads the problem {ref.sample} places on; with {len(problems)} in the task that is the same one"
                )
                return [(where, text)]
            if ref.sample and cell.kind == "prompt_swap" and not _prompts_differ(cell, ref, samples, problems):
                return [(where, "reads the prompt of another problem, and every problem of the task has the same one")]
    return []


def _roundless(experiment: Experiment, samples: Sequence[Sample]) -> list[Problem]:
    """Return why an experiment cannot be computed in rounds."""
    if experiment.precision is not None:
        try:
            Rounds.of(experiment.precision, samples)
        except NoRoundsError as error:
            return [(("experiments", experiment.name, "precision"), str(error))]
    return []


def _prompts_differ(cell: Intervention, ref: RunRef, samples: Sequence[Sample], problems: Problems) -> bool:
    def text(sample: Sample, run: RunName) -> str:
        return sample.clean_prompt if run == "clean" else sample.corrupted_prompt

    return any(
        text(samples[problems.referred(ref, i)], ref.run) != text(sample, cell.recipient)
        for i, sample in enumerate(samples)
    )


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
    if experiment.screen is not None:
        problems.append((("previews", "patched", "screen"), "a preview is computed, not screened"))
    if experiment.precision is not None:
        problems.append((("previews", "patched", "precision"), "a preview is one run, which has no precision"))
    if grid.cells != 1:
        problems.append((("previews", "patched"), f"describes {grid.cells} interventions; give exactly one"))
        return None
    return next(grid.interventions())
