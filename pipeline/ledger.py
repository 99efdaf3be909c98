"""What the driver knows of every unit: read from status and journal, written back by the driver alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.layout import BASELINE, Unit
from pipeline.plan import Plan
from pipeline.rounds import OpenCells, count_window
from pipeline.store import DONE, FAILED, PENDING, Journal, Lease, Store, ends

FLUSH_SECONDS = 2.0
"""How often the driver writes status; units finished since then are recovered from the journal."""


class Ledger:
    """Status and failed cells of every unit, five bytes a unit, whatever the size of the sweep.

    Parameters
    ----------
    lease : checked before every write, so that a driver that was taken over from writes nothing more.
    """

    def __init__(self, store: Store, plan: Plan, journal: Journal, lease: Lease) -> None:
        self._store, self._plan, self._journal, self._lease = store, plan, journal, lease
        self.open_cells = OpenCells(plan, store)
        self._groups = (BASELINE, *plan.by_name)
        self._status: dict[str, NDArray[np.uint8]] = {g: store.status(g) for g in self._groups}
        self._failed: dict[str, NDArray[np.int32]] = {g: np.zeros(len(s), np.int32) for g, s in self._status.items()}
        self._dirty: set[str] = set()
        self._flushed = time.monotonic()
        self._recover()

    def __len__(self) -> int:
        return sum(len(status) for status in self._status.values())

    @property
    def failed_cells(self) -> int:
        """Cells without a finite value, as far as the journal knows."""
        return sum(int(failed.sum()) for failed in self._failed.values())

    def count(self, status: int) -> int:
        """Count units with a status."""
        return sum(int((values == status).sum()) for values in self._status.values())

    def pending(self, numbers: Iterable[int]) -> Iterator[Unit]:
        """Yield the units of some numbers that still have to run; failed ones are tried again by a new call."""
        for number in numbers:
            unit = self._plan.layout.unit(number)
            if self._status[unit.group][unit.index] != DONE:
                yield unit

    def todo(self) -> tuple[int, int]:
        """Count the units that still have to run, and their cells."""
        units = cells = 0
        for group, status in self._status.items():
            windows = self._plan.layout.windows(group)
            # Units of a group lie sample by sample, so a column is one window of all samples.
            of_samples = (status != DONE).reshape(-1, windows.count)
            waiting = of_samples.sum(axis=0).tolist()
            units += sum(waiting)
            if group in self._plan.rounds:
                cells += self._cells_in_rounds(group, of_samples)
            else:
                cells += sum(n * self._cells(group, *windows.bounds(w)) for w, n in enumerate(waiting) if n)
        return units, cells

    def _cells_in_rounds(self, group: str, waiting: NDArray[np.bool_]) -> int:
        """Count the cells of waiting units, (samples, windows), that a round computes or may compute."""
        windows, ends, cells = self._plan.layout.windows(group), self._plan.rounds[group].samples, 0
        for round_, (start, stop) in enumerate(itertools.pairwise([0, *ends])):
            open_ = self.open_cells.latest(group, round_)
            counts = waiting[start:stop].sum(axis=0).tolist()
            cells += sum(n * count_window(open_, *windows.bounds(w)) for w, n in enumerate(counts) if n)
        return cells

    def cells(self, unit: Unit) -> int:
        """Return the number of cells that a unit computes, expected if they are yet to be chosen."""
        if unit.group in self._plan.rounds:
            return self.open_cells.count(unit)
        return self._cells(unit.group, unit.start, unit.stop)

    def done(self, unit: Unit, failed: int) -> None:
        """Mark a unit that was computed; with cells that failed it counts as failed."""
        self._mark(unit.group, unit.index, FAILED if failed else DONE, failed)

    def failed(self, unit: Unit) -> None:
        """Mark a unit that could not be computed."""
        self._mark(unit.group, unit.index, FAILED, self.cells(unit))

    def flush(self, *, force: bool = False) -> None:
        """Write changed status arrays, at most every ``FLUSH_SECONDS`` unless forced.

        Raises
        ------
        LeaseLostError : another process drives the store by now.
        StorageFullError, StorageReadOnlyError : it cannot be written.
        """
        if not force and time.monotonic() - self._flushed < FLUSH_SECONDS:
            return
        self._lease.check()
        # A unit that is marked done has its receipt in the journal.
        self._journal.flush()
        for group in sorted(self._dirty):
            self._store.write_status(group, self._status[group])
        self._dirty.clear()
        self._flushed = time.monotonic()

    def _recover(self) -> None:
        for group, index, status, entry in ends(self._journal, self._status):
            self._mark(group, index, status, 0 if status == PENDING else int(entry.get("failed", 0)))

    def _mark(self, group: str, index: int, status: int, failed: int) -> None:
        if self._status[group][index] != status:
            self._status[group][index] = status
            self._dirty.add(group)
        self._failed[group][index] = failed

    def _cells(self, group: str, start: int, stop: int) -> int:
        if group == BASELINE:
            return self._plan.unit_cells(Unit(id=0, group=BASELINE, index=0, sample=0))
        screened = self._plan.by_name[group].experiment.screen is not None
        chosen = self._store.chosen(group, start, stop) if screened else None
        return self._plan.window_cells(group, start, stop) if chosen is None else int(chosen.sum())
