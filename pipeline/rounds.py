"""Looks at a store between two rounds: which cells have stopped, from what is stored alone, and which go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.events import UnitDone
from interventions.sites import RUNS
from pipeline.experiment import Grid
from pipeline.layout import BASELINE, Unit
from pipeline.metrics.metric import METRICS
from pipeline.plan import Plan
from pipeline.precision import Floats, Observed, narrow
from pipeline.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    """The receipt of a unit that was not computed, as all of its cells have stopped."""

    cells: int = 0
    failed: int = 0
    bytes: int = 0
    row_forwards: int = 0
    seconds: float = 0.0
    gpu_bytes: int = 0


def skipped(unit: Unit) -> UnitDone:
    """Return what observers are told of a unit that is done without being computed; no replica was it."""
    return UnitDone(unit=unit.id, replica=-1, attempt=0, seconds=0.0, receipt=Nothing())


class OpenCells:
    """The cells of experiments in rounds that are computed in a round, read from the looks that were made."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self._plan, self._store = plan, store
        self._read: dict[str, tuple[int, NDArray[np.bool_]]] = {}

    def of(self, group: str, round_: int) -> NDArray[np.bool_] | None:
        """Return the cells that a round computes, shaped as the grid; None while the look before it is not made."""
        if round_ == 0:
            return np.ones(self._plan.by_name[group].shape, dtype=np.bool_)
        kept = self._read.get(group)
        if kept is None or kept[0] != round_:
            stopped = self._store.stopped(group, round_ - 1)
            if stopped is None:
                return None
            # A look that is made never changes.
            self._read[group] = kept = (round_, ~stopped)
        return kept[1]

    def latest(self, group: str, round_: int) -> NDArray[np.bool_]:
        """Return the cells that a round computes, or those that it may: cells only ever stop."""
        for before in range(round_, 0, -1):
            if (found := self.of(group, before)) is not None:
                return found
        return np.ones(self._plan.by_name[group].shape, dtype=np.bool_)

    def count(self, unit: Unit) -> int:
        """Return how many cells of a unit are computed, or may be."""
        return count_window(self.latest(unit.group, self.round_of(unit)), unit.start, unit.stop)

    def round_of(self, unit: Unit) -> int:
        """Return the round of a unit's sample."""
        return self._plan.rounds[unit.group].round_of(unit.sample)


def count_window(cells: NDArray[np.bool_], start: int, stop: int) -> int:
    """Count the cells in a window of the first axis; a grid without axes is one cell."""
    return int(cells[start:stop].sum() if cells.ndim else cells.sum())


def make_look(plan: Plan, store: Store, name: str, look: int) -> None:
    """Write which cells of an experiment have stopped by a look, from what is stored.

    Raises
    ------
    CorruptedError : a value cannot be read, or is missing. ValueError : the look before is not made.
    """
    before = store.stopped(name, look - 1) if look else np.zeros(plan.by_name[name].shape, dtype=np.bool_)
    if before is None:
        raise ValueError(f"look {look} of {name} comes before look {look - 1}. Make them in order.")
    store.write_look(name, look, decide(plan, store, name, look, before))


def decide(plan: Plan, store: Store, name: str, look: int, before: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which cells of an experiment have stopped by a look, shaped as its grid.

    A function of the stored values of the rounds before it, window by window of units; the store may be that of the
    same sweep without precision.

    Parameters
    ----------
    before : cells that had stopped by the look before; their values are not read.

    Raises
    ------
    CorruptedError : a value cannot be read, or is missing.
    """
    grid, rounds = plan.by_name[name], plan.rounds[name]
    settings, samples = grid.experiment.precision, rounds.samples[look]
    assert settings is not None
    metric = METRICS[settings.metric].name
    clean, corrupted = _recorded(store, metric, samples)
    keys = [(sample.pair, sample.prompt) for sample in plan.samples[:samples]]
    level = rounds.level(settings)
    of_clean, stopped, windows = _of_clean_run(grid), before.copy(), plan.layout.windows(name)
    for start, stop in map(windows.bounds, range(windows.count)):
        cut: Any = slice(start, stop) if grid.shape else ...
        goes_on = ~before[cut].ravel()
        if not goes_on.any():
            continue
        values = store.sample_values(f"{name}/{metric}", samples, start, stop).reshape(samples, -1)[:, goes_on]
        recipient = of_clean[cut].ravel()[goes_on]
        observed = Observed(
            values=values.astype(np.float64),
            reference=np.where(recipient, clean[:, None], corrupted[:, None]),
            clean=clean,
            corrupted=corrupted,
            keys=keys,
        )
        found = before[cut].flatten()
        found[goes_on] = narrow(observed, settings, level)
        stopped[cut] = found.reshape(before[cut].shape)
    return stopped


def differences(plan: Plan, store: Store, name: str, metric: str) -> Floats:
    """Return a metric of every cell minus that of its recipient run, (samples, cells)."""
    samples = len(plan.samples)
    clean, corrupted = _recorded(store, metric, samples)
    values = store.sample_values(f"{name}/{metric}", samples).astype(np.float64).reshape(samples, -1)
    recipient = _of_clean_run(plan.by_name[name]).ravel()
    return values - np.where(recipient, clean[:, None], corrupted[:, None])


def _recorded(store: Store, metric: str, samples: int) -> tuple[Floats, Floats]:
    both = store.sample_values(f"{BASELINE}/{metric}", samples).astype(np.float64)
    return both[:, RUNS.index("clean")], both[:, RUNS.index("corrupted")]


def _of_clean_run(grid: Grid) -> NDArray[np.bool_]:
    """Return of which cells the recipient is the clean run, by the one axis that it may depend on."""
    origin = (0,) * len(grid.shape)
    axis = next((i for i, name in enumerate(grid.dims) if name in ("run", "direction")), None)
    if axis is None:
        return np.full(grid.shape, grid.intervention(origin).recipient == "clean")
    at = [(*origin[:axis], i, *origin[axis + 1 :]) for i in range(grid.shape[axis])]
    along = np.array([grid.intervention(index).recipient == "clean" for index in at])
    shape = [len(along) if i == axis else 1 for i in range(len(grid.shape))]
    return np.broadcast_to(along.reshape(shape), grid.shape)
