"""Effects of metrics that are a field: at every position a mean with a t interval, in one pass over the stored chunks.

A bootstrap at every position would cost thousands of times the mean itself, so there is none: no p-value, no recovery,
and an interval that assumes means over units to be roughly normal. Each task reads one window of cells (what a unit of
work wrote) of a block of experimental units, chunk by chunk; blocks merge, and windows are written one by one. Memory
is that of a few windows, whatever the size of the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any

import dask
import dask.array as da
import numpy as np
import zarr
from dask.delayed import delayed
from dask.system import CPU_COUNT
from numpy.typing import NDArray
from scipy.special import stdtrit

from pipeline.effects.experiment import ALL_PAIRS, PENDING, Experiment, Recorded, recipients
from pipeline.effects.field_state import FieldMoments, Finite, UnitMean, all_finite
from pipeline.store import Place, locate
from pipeline.store.regions import has_axes

METHOD = (
    "fields: at every position the mean over {unit}s with its t interval (n - 1 degrees of freedom, no interval below "
    "two {unit}s); no bootstrap, p-values or recovery there"
)
MEMORY = 400 * 2**20
"""Bytes that the arrays of all running tasks may take together; fewer tasks run at once where windows are large."""

KINDS: dict[str, type[Any]] = {
    "difference": np.float32,
    "difference_low": np.float32,
    "difference_high": np.float32,
    "n": np.int32,
    "failed": np.int64,
}
"""The maps of a field, by type."""

Unit = tuple[tuple[str, tuple[int, ...]], ...]
"""The samples of one experimental unit by pair kind, as positions in the experiment."""


@dataclass(frozen=True, slots=True)
class WindowState:
    """Moments of one window of cells per row of the map, and the cells that were due and lack a value somewhere."""

    moments: tuple[FieldMoments, ...]
    failed: NDArray[np.int64]

    def merge(self, other: WindowState) -> WindowState:
        """Return the state of both sets of units; the arrays of the first are reused."""
        merged = tuple(a.merge(b) for a, b in zip(self.moments, other.moments, strict=True))
        return WindowState(merged, self.failed + other.failed)


@dataclass(frozen=True)
class FieldMetric:
    """One field of one experiment, compared with the recorded runs.

    Attributes
    ----------
    values, baseline : the stored arrays, (sample, axes, field) and (sample, run, field).
    due : (sample, axes), cells that should have a value. runs : (axes), position of the recipient along ``run``.
    """

    experiment: Experiment
    name: str
    recorded: Recorded
    values: Any
    baseline: Any
    due: NDArray[np.bool_]
    runs: NDArray[np.int64]

    @classmethod
    def open(cls, place: Place, experiment: Experiment, name: str, recorded: Recorded) -> FieldMetric:
        """Open the arrays of a metric; nothing of them is read."""
        store = locate(place).zarr(read_only=True)
        root = zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False)
        order = [str(run) for run in root["baseline/run"][...]]
        status = experiment.cell_status(name)
        shape = [experiment.dataset.sizes[d] for d in ("sample", *experiment.axes)]
        due = np.zeros(shape, np.bool_) if status is None else status != PENDING
        return cls(
            experiment=experiment,
            name=name,
            recorded=recorded,
            values=root[f"{experiment.name}/{name}"],
            baseline=root[f"baseline/{name}"],
            due=due & experiment.computed,
            runs=_recipient_runs(experiment, order),
        )

    @cached_property
    def field(self) -> tuple[int, ...]:
        """Shape of the field of one cell."""
        return tuple(self.values.shape[1 + len(self.experiment.axes) :])

    @cached_property
    def windows(self) -> list[slice]:
        """What the stored chunks hold of the first axis; one for an experiment without axes."""
        if not has_axes(self.values):
            return [slice(0, 1)]
        extent, width = self.values.shape[1], self.values.chunks[1]
        return [slice(start, min(start + width, extent)) for start in range(0, extent, width)]

    @cached_property
    def pairs(self) -> tuple[str, ...]:
        """Pair kinds with a row of their own in the moments: none where there is one kind, which all are."""
        return self.recorded.pairs if len(self.recorded.pairs) > 1 else ()

    @cached_property
    def keys(self) -> list[tuple[str, str]]:
        """Return (pair, unit) of each sample of the experiment."""
        return [(pair, unit) for pair, unit in (self.recorded.keys[i] for i in self.numbers)]

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """Number of each sample of the experiment among all samples."""
        return self.experiment.sample_positions()

    def blocks(self, samples: int) -> list[tuple[Unit, ...]]:
        """Cut the experimental units, in stored order, into blocks of at least so many samples."""
        units: dict[str, dict[str, list[int]]] = {}
        for position, (pair, unit) in enumerate(self.keys):
            units.setdefault(unit, {}).setdefault(pair, []).append(position)
        found: list[list[Unit]] = [[]]
        held = 0
        for by_pair in units.values():
            if held >= samples:
                found.append([])
                held = 0
            found[-1].append(tuple((pair, tuple(positions)) for pair, positions in by_pair.items()))
            held += sum(len(positions) for positions in by_pair.values())
        return [tuple(block) for block in found]

    def extent(self, window: slice) -> tuple[int, ...]:
        """Return the shape of a window's cells."""
        return (window.stop - window.start, *self.values.shape[2 : 1 + len(self.axes)]) if self.axes else ()

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes of the experiment."""
        return self.experiment.axes

    def state(self, window: slice, block: tuple[Unit, ...]) -> WindowState:
        """Reduce one window of cells over a block of units."""
        cells, positions = prod(self.extent(window)), prod(self.field)
        moments = {row: FieldMoments.zero((cells, positions)) for row in (ALL_PAIRS, *self.pairs)}
        failed = {row: np.zeros(cells, np.int64) for row in moments}
        for unit in block:
            if sum(len(samples) for _, samples in unit) == 1:
                ((pair, (sample,)),) = unit
                seen = self._read(sample, window, failed, pair)
                for row in self._rows(pair):
                    moments[row].take(*seen)
            else:
                self._take_together(unit, window, moments, failed)
        return WindowState(tuple(moments.values()), np.stack(list(failed.values())))

    def _take_together(
        self, unit: Unit, window: slice, moments: dict[str, FieldMoments], failed: dict[str, NDArray[np.int64]]
    ) -> None:
        """Take in a unit of several samples: their mean, over all and in each pair kind."""
        shape = moments[ALL_PAIRS].n.shape
        whole = UnitMean.zero(shape)
        for pair, samples in unit:
            part = UnitMean.zero(shape) if self.pairs else None
            for sample in samples:
                seen = self._read(sample, window, failed, pair)
                whole.add(*seen)
                if part is not None:
                    part.add(*seen)
            if part is not None:
                part.into(moments[pair])
        whole.into(moments[ALL_PAIRS])

    def _rows(self, pair: str) -> tuple[str, ...]:
        return (ALL_PAIRS, pair) if self.pairs else (ALL_PAIRS,)

    def _read(
        self, sample: int, window: slice, failed: dict[str, NDArray[np.int64]], pair: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], Finite]:
        """Return a window's values (cells, positions), those of the recipient run, and where both are finite.

        Cells that are due and lack a value are counted in ``failed``.
        """
        positions = prod(self.field)
        values = np.asarray(self.values[sample, window] if self.axes else self.values[sample]).reshape(-1, positions)
        recorded = np.asarray(self.baseline[int(self.numbers[sample])]).reshape(-1, positions)
        runs = np.unique(self.runs)
        reference = recorded[runs] if runs.size == 1 else recorded[self._of_window(self.runs, window)]
        if all_finite(values) and all_finite(reference):
            return values, reference, None
        finite = np.isfinite(values) & np.isfinite(reference)
        lost = self._of_window(self.due[sample], window) & ~finite.all(axis=1)
        for row in self._rows(pair):
            failed[row] += lost
        return values, reference, finite

    def _of_window(self, cells: NDArray[Any], window: slice) -> NDArray[Any]:
        return (cells[window] if self.axes else cells).reshape(-1)

    def task_bytes(self) -> int:
        """Return about how many bytes a running task takes."""
        values = prod(self.extent(self.windows[0])) * prod(self.field)
        seeds = 32 if len(self.keys) > len({unit for _, unit in self.keys}) else 0
        return values * (24 * (1 + len(self.pairs)) + 12 + seeds)


def field_variables(
    metric: FieldMetric, level: float, chunk_samples: int
) -> dict[str, tuple[tuple[str, ...], da.Array]]:
    """Return the maps of a metric by name, with their dimensions; lazy, so that nothing is computed before the write.

    ``difference`` with its bounds, the units ``n`` behind it, and ``failed`` cells, a cell counted once.
    """
    blocks_of_units = metric.blocks(chunk_samples)
    states = [_window_state(metric, window, blocks_of_units) for window in metric.windows]
    dims = ("pair", *metric.axes)
    field = tuple(str(d) for d in metric.experiment.dataset[metric.name].dims[1 + len(metric.axes) :])
    found = {}
    for name, dtype in KINDS.items():
        shape = () if name == "failed" else metric.field
        blocks = [
            da.from_delayed(
                delayed(_output, traverse=False)(state, name, level, (metric.extent(window), shape), metric.pairs),
                (1 + len(metric.recorded.pairs), *metric.extent(window), *shape),
                dtype=dtype,
            )
            for state, window in zip(states, metric.windows, strict=True)
        ]
        whole = da.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]
        found[name] = ((*dims, *(() if name == "failed" else field)), whole)
    return found


def workers(metrics: list[FieldMetric]) -> int:
    """Return how many tasks may run at once."""
    largest = max((metric.task_bytes() for metric in metrics), default=1)
    return max(1, min(CPU_COUNT, MEMORY // largest))


def computing(metrics: list[FieldMetric]) -> Any:
    """Return a context in which lazy maps are computed by threads, no more of them than memory allows."""
    return dask.config.set(scheduler="threads", num_workers=workers(metrics))


def _window_state(metric: FieldMetric, window: slice, blocks: list[tuple[Unit, ...]]) -> Any:
    # Bound here, as Dask would search arguments for values of its own, number by number.
    level = [delayed(partial(metric.state, window, block), traverse=False)() for block in blocks]
    while len(level) > 1:
        merged = [delayed(WindowState.merge)(a, b) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = merged + level[len(merged) * 2 :]
    return level[0]


def _output(
    state: WindowState, name: str, level: float, shape: tuple[tuple[int, ...], tuple[int, ...]], pairs: tuple[str, ...]
) -> NDArray[Any]:
    """Return one map of a window, (pair, cells, field)."""
    rows = list(state.failed) if name == "failed" else [_estimate(moments, name, level) for moments in state.moments]
    # One pair kind is all of them.
    rows = rows if pairs else [*rows, *rows]
    cells, field = shape
    return np.stack([row.reshape((*cells, *field)) for row in rows])


def _estimate(moments: FieldMoments, name: str, level: float) -> NDArray[Any]:
    n = moments.n
    if name == "n":
        return n.astype(np.int32)
    if name == "difference":
        return np.where(n > 0, moments.mean, np.nan).astype(np.float32)
    counts = np.arange(int(n.max(initial=0.0)) + 1)
    quantile = np.where(counts > 1, stdtrit(np.maximum(counts - 1, 1), (1 + level) / 2), np.nan)
    reach = np.sqrt(moments.m2 / np.maximum(n * (n - 1), 1.0)) * quantile[n.astype(np.int64)]
    bound = moments.mean - reach if name == "difference_low" else moments.mean + reach
    return bound.astype(np.float32)


def _recipient_runs(experiment: Experiment, order: list[str]) -> NDArray[np.int64]:
    """Return for every cell the position of its recipient along ``run``, shaped as the axes."""
    shape = [experiment.dataset.sizes[a] for a in experiment.axes]
    run = recipients(experiment.dataset)
    if isinstance(run, str):
        return np.full(shape, order.index(run), np.int64)
    (axis, names), *_ = run.items()
    along = [len(names) if a == axis else 1 for a in experiment.axes]
    return np.broadcast_to(np.array([order.index(n) for n in names], np.int64).reshape(along), shape)
