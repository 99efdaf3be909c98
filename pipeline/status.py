"""How far a store is: units and cells of each group, speed, time left, replicas, and failures by cause."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from interventions.sites import RUNS
from pipeline.causes import Cause, clean
from pipeline.permissions import array_name
from pipeline.plan import BASELINE
from pipeline.precision import HAS_STOPPED, LOOK_SAMPLES, NOT_LOOKED, STOPPED
from pipeline.screening import EXACT, OPEN, VERIFIED, Screen
from pipeline.store import DONE, FAILED, PENDING, Place, Store, StoreError, open_store
from pipeline.tail import Files, JournalReader, LocalFiles, Offset, ZarrFiles
from pipeline.tally import UNTOLD, ReplicaTally, Speed, Tally

PATIENCE_SECONDS = 60.0
"""A sweep that nothing was heard of for this long, and for three of its longest units, is not called running."""
RECENT_SECONDS = 300.0
LEASE = "lease"

State = Literal["running", "silent", "stopped", "finished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatus:
    """Units and cells of one group; cells of a screened one are those that are, or are expected to be, computed."""

    group: str
    units: int
    done: int
    pending: int
    failed: int
    cells: int
    cells_done: int
    cells_pending: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """Who took the store's lease last, when its heart beat last, and whether the lease was given back.

    Attributes
    ----------
    heartbeat : seconds since the epoch.
    """

    holder: str
    heartbeat: float
    released: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A store at one moment.

    Attributes
    ----------
    state : finished when nothing is pending, stopped when the driver has given the store back before, silent when
        nothing was heard for longer than ``PATIENCE_SECONDS`` and three of the longest units, else running.
    heard_s : seconds since the last entry of the journal or beat of the driver. left_s : estimated time left.
    replicas : those that were heard of lately. replicas_seen : how many there ever were.
    bytes, row_forwards : over all finished attempts. gpu_bytes : largest peak of a unit.
    """

    store: str
    state: State
    groups: tuple[GroupStatus, ...]
    speed: Speed | None
    left_s: float | None
    heard_s: float
    driver: Driver | None
    replicas: tuple[ReplicaTally, ...]
    replicas_seen: int
    retries: int
    losses: int
    causes: tuple[Cause, ...]
    bytes: int
    row_forwards: int
    gpu_bytes: int
    now: float

    def total(self, name: str) -> int:
        """Add up a count of the groups."""
        return sum(int(getattr(group, name)) for group in self.groups)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        replicas = [
            {k: v for k, v in asdict(r).items() if k != "recent"} | {"cells_per_s": r.cells_per_s}
            for r in self.replicas
        ]
        return {**asdict(self), "replicas": replicas}


def summarise(path: Place) -> list[dict[str, Any]]:
    """Count units by status for every group that has one; finished units still in the journal only are counted.

    Raises
    ------
    StoreError : the path is not a store.
    """
    names = ("group", "units", "done", "pending", "failed")
    return [{name: getattr(group, name) for name in names} for group in Watch(path).look().groups]


class Watch:
    """Looks at a store again and again, reading only what is new in its journal.

    Parameters
    ----------
    clock : seconds since the epoch.

    Raises
    ------
    StoreError : the path is not a store.
    """

    def __init__(self, path: Place, clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock = path, clock
        self._open()

    def _open(self) -> None:
        self.store = open_store(self.path)
        self.files = files_of(self.store)
        self._reader, self._offset = JournalReader(self.files), Offset()
        self._cells: dict[str, NDArray[np.int64]] = {}
        self.tally = Tally({group: len(self.store.status(group)) for group in self.store.groups()})

    def look(self) -> Snapshot:
        """Read what is new and return how far the store is now."""
        if self._reader.shrunk(self._offset):
            # The store was removed and begun again.
            self._open()
        for entries, after in self._reader.new(self._offset):
            self._offset = after
            for entry in entries:
                self.tally.add(entry)
        try:
            counts = {name: self._count(name) for name in self.tally.groups}
        except (KeyError, OSError) as error:
            raise StoreError(f"store {self.path} can no longer be read: {error}. Has it been moved?") from error
        work = {
            name: (count.cells_pending, self.tally.groups[name].seconds, self.tally.groups[name].cells)
            for name, count in counts.items()
        }
        return self._snapshot(tuple(counts.values()), estimate_work(work))

    def _count(self, name: str) -> GroupStatus:
        status = merge_status(self.store.status(name), self.tally.groups[name].status)
        if name not in self._cells:
            cells, final = unit_cells(self.store, name)
            if not final:
                return count_group(name, status, cells)
            self._cells[name] = cells
        return count_group(name, status, self._cells[name])

    def _snapshot(self, groups: tuple[GroupStatus, ...], work: float | None) -> Snapshot:
        tally, now, speed = self.tally, self._clock(), self.tally.pace.speed()
        driver = read_lease(self.files)
        beats = [t for t in (tally.heard, driver and driver.heartbeat) if t] or [_created(self.store)]
        heard_s = max(0.0, now - max(beats))
        recent = tuple(tally.recent_replicas(max(RECENT_SECONDS, 3 * tally.longest)))
        return Snapshot(
            store=str(self.path),
            state=judge(groups, driver, heard_s, now, max(PATIENCE_SECONDS, 3 * tally.longest)),
            groups=groups,
            speed=speed,
            left_s=work / speed.busy if work is not None and speed is not None and speed.busy else None,
            heard_s=heard_s,
            driver=driver,
            replicas=recent,
            replicas_seen=len(tally.replicas),
            retries=tally.retries,
            losses=tally.losses,
            causes=tuple(tally.failures()),
            bytes=tally.bytes,
            row_forwards=tally.row_forwards,
            gpu_bytes=tally.gpu_bytes,
            now=now,
        )


def judge(groups: Sequence[GroupStatus], driver: Driver | None, heard_s: float, now: float, patience: float) -> State:
    """Say whether a sweep runs; see ``Snapshot``.

    Parameters
    ----------
    heard_s : seconds since anything was heard. now : seconds since the epoch. patience : longest silence in seconds.
    """
    held = driver is not None and not driver.released
    beats = held and driver is not None and now - driver.heartbeat <= PATIENCE_SECONDS
    # With its lease held, a driver may still be about to try failed units again.
    if not any(g.pending for g in groups) and not (beats and any(g.failed for g in groups)):
        return "finished"
    if driver is not None and driver.released:
        return "stopped"
    return "running" if beats or heard_s <= patience else "silent"


def files_of(store: Store) -> Files:
    """Return the way to the files beside a store's arrays."""
    from zarr.storage import LocalStore

    place = store.root.store_path
    if isinstance(place.store, LocalStore):
        return LocalFiles(Path(place.store.root) / place.path)
    return ZarrFiles(place.store, place.path)


def merge_status(stored: NDArray[np.uint8], told: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the status of a group's units: what the journal tells, which is ahead of the array, else the array."""
    return np.where(told[: len(stored)] != UNTOLD, told[: len(stored)], stored).astype(np.uint8)


def unit_cells(store: Store, group: str) -> tuple[NDArray[np.int64], bool]:
    """Return the cells of the units of one sample, from the shapes and chunks of the arrays and what was chosen.

    A group in which no array tells has one cell a unit. Of an experiment in rounds, the cells of all of its units.

    Returns
    -------
    The cells, and whether that is final; of a screened group it is only expected until the cells are chosen, and of one
    in rounds it is the most until the last look.
    """
    if group == BASELINE:
        return np.array([len(RUNS)]), True
    arrays: Any = store.root[group]
    metrics = json.loads(str(store.root.attrs["config_json"])).get("metrics", [])
    array = next((arrays[name] for name in map(array_name, metrics) if name in arrays), None)
    if array is not None and STOPPED in arrays:
        return _cells_in_rounds(arrays, array)
    if array is None or array.ndim < 2:
        return np.array([1]), True
    starts = range(0, array.shape[1], array.chunks[1])
    rest = math.prod(array.shape[2:])
    cells = np.array([(min(s + array.chunks[1], array.shape[1]) - s) * rest for s in starts])
    if EXACT not in arrays:
        return cells, True
    chosen = np.asarray(arrays[EXACT][...])
    if not (chosen == OPEN).any():
        return np.array([int((chosen[s : s + array.chunks[1]] == VERIFIED).sum()) for s in starts]), True
    settings = {k: v for k, v in json.loads(arrays.attrs["screen"]).items() if k in Screen.model_fields}
    share = Screen(**settings).verified_cells(chosen.size) / chosen.size
    return np.maximum(1, np.round(cells * share)).astype(np.int64), False


def _cells_in_rounds(arrays: Any, array: Any) -> tuple[NDArray[np.int64], bool]:
    stopped = np.asarray(arrays[STOPPED][...])
    # Sorted and cut to size, as a store may come from anywhere.
    ends = np.clip(np.sort(np.asarray(arrays[LOOK_SAMPLES][...])), 0, array.shape[0]).tolist()
    made = [not (look == NOT_LOOKED).any() for look in stopped]
    width = array.chunks[1] if stopped.ndim > 1 else 1
    starts = range(0, stopped.shape[1], width) if stopped.ndim > 1 else range(1)
    open_, found = np.ones(stopped.shape[1:], dtype=np.bool_), []
    for round_, (start, stop) in enumerate(pairwise([0, *ends[: len(stopped)], array.shape[0]])):
        if round_ and made[round_ - 1]:
            open_ = stopped[round_ - 1] != HAS_STOPPED
        counts = [int(open_[s : s + width].sum() if open_.ndim else open_) for s in starts]
        found.append(np.tile(np.array(counts, dtype=np.int64), stop - start))
    return np.concatenate(found), all(made)


def count_group(name: str, status: NDArray[np.uint8], cells: NDArray[np.int64]) -> GroupStatus:
    """Count units, and cells by the window of each unit: those of a sample lie beside each other."""
    windows = np.arange(len(status)) % len(cells)
    units = {code: int((status == code).sum()) for code in (DONE, PENDING, FAILED)}
    of = {
        code: int((np.bincount(windows[status == code], minlength=len(cells)) * cells).sum())
        for code in (DONE, PENDING, FAILED)
    }
    return GroupStatus(
        group=clean(name),
        units=len(status),
        done=units[DONE],
        pending=units[PENDING],
        failed=units[FAILED],
        cells=sum(of.values()),
        cells_done=of[DONE],
        cells_pending=of[PENDING],
    )


def estimate_work(groups: Mapping[str, tuple[int, float, int]]) -> float | None:
    """Return the seconds of one replica that the pending cells will take; None if no unit has told.

    Every group is judged by its own cells: baselines are few cells and long, and units of a map differ from those
    of a swap. A group without a finished unit counts as the mean of the experiments, or else as the baseline.

    Parameters
    ----------
    groups : of each group its pending cells, and seconds and cells of its finished units.
    """
    told = [(seconds, cells) for _, seconds, cells in groups.values() if cells]
    if not told:
        return None
    experiments = [(s, c) for name, (_, s, c) in groups.items() if c and name != BASELINE] or told
    usual = sum(s for s, _ in experiments) / sum(c for _, c in experiments)
    return sum(pending * (seconds / cells if cells else usual) for pending, seconds, cells in groups.values())


def read_lease(files: Files) -> Driver | None:
    """Return who took the lease of a store last; None if nobody did, or if that file is no lease."""
    names = [name for name in files.names(LEASE) if name.split("/")[-1].removesuffix(".json").isdecimal()]
    if not names:
        return None
    try:
        about = json.loads(files.read(names[-1], 0, 2**16))
        holder = f"process {about['holder']['process']} on {about['holder']['host']}"
        return Driver(holder=clean(holder)[:100], heartbeat=_epoch(about["time"]), released=about["released"] is True)
    except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
        return None


def _epoch(value: Any) -> float:
    """Return a time as seconds since the epoch, from such a number or from ISO 8601."""
    found = datetime.fromisoformat(value).timestamp() if isinstance(value, str) else float(value)
    if not math.isfinite(found):
        raise ValueError(f"not a time: {value!r}")
    return found


def _created(store: Store) -> float:
    try:
        return _epoch(str(store.root.attrs["created"]))
    except (ValueError, LookupError, OverflowError):
        return 0.0
