"""A journal added up line by line, in memory that grows with units and replicas but not with lines."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.causes import NOT_FINITE, Cause, Causes

PENDING, DONE, FAILED = 0, 1, 2
UNTOLD = 255
"""Status of a unit that the journal says nothing of."""
WINDOW_SECONDS = 300.0
LEAST_UNITS = 20
"""The speed is that of the last minutes, or of this many units where they take longer."""
IDLE_SECONDS = 60.0
"""A time in which no unit ran, as between two calls of ``stepscope run``, is no part of the speed."""
MOST_REPLICAS = 4096
_MOST_SLOTS = 1000
_RECENT = 8
_LARGEST = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast units finished lately.

    Attributes
    ----------
    units_per_s, cells_per_s : over ``span_s`` seconds. busy : replicas that computed at once, on average.
    """

    units_per_s: float
    cells_per_s: float
    busy: float
    span_s: float


@dataclass(slots=True)
class _Slot:
    second: int
    begin: float
    end: float
    units: int = 0
    cells: int = 0
    seconds: float = 0.0


class Pace:
    """Finished units by the second, as far back as the speed of the last minutes needs."""

    def __init__(self) -> None:
        self._slots: deque[_Slot] = deque(maxlen=_MOST_SLOTS)

    def add(self, time: float, seconds: float, cells: int) -> None:
        """Count one finished unit."""
        second = math.floor(time)
        # A clock that is set back adds to the latest second.
        if not self._slots or second > self._slots[-1].second:
            self._slots.append(_Slot(second, time - seconds, time))
        slot = self._slots[-1]
        slot.begin, slot.end = min(slot.begin, time - seconds), max(slot.end, time)
        slot.units, slot.cells, slot.seconds = slot.units + 1, slot.cells + cells, slot.seconds + seconds

    def speed(self) -> Speed | None:
        """Return the speed over the last minutes in which units ran; None before the first unit."""
        if not self._slots:
            return None
        end, start = self._slots[-1].end, self._slots[-1].begin
        units = cells = 0
        seconds = 0.0
        for slot in reversed(self._slots):
            if start - slot.end > IDLE_SECONDS:
                break
            if end - slot.end > WINDOW_SECONDS and units >= LEAST_UNITS:
                # Units that ended in here count whole, so the span begins where the ones before them ended.
                start = slot.end
                break
            start = min(start, slot.begin)
            units, cells, seconds = units + slot.units, cells + slot.cells, seconds + slot.seconds
        span = max(end - start, 1e-3)
        return Speed(units_per_s=units / span, cells_per_s=cells / span, busy=seconds / span, span_s=span)


@dataclass(slots=True, kw_only=True)
class ReplicaTally:
    """What one replica has done.

    Attributes
    ----------
    units, cells, seconds : over all units that it finished. last : its latest one, as "group 7".
    heard : when that was, in seconds since the epoch. gpu_bytes : peak over its units. losses : times it was lost.
    """

    replica: int
    units: int = 0
    cells: int = 0
    seconds: float = 0.0
    last: str = ""
    heard: float = 0.0
    gpu_bytes: int = 0
    losses: int = 0
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))

    @property
    def cells_per_s(self) -> float:
        """Cells of its latest units over the seconds that they took."""
        seconds = sum(s for _, s in self.recent)
        return sum(c for c, _ in self.recent) / seconds if seconds else 0.0


@dataclass(slots=True, kw_only=True)
class GroupTally:
    """The units of one group: status and cause of each, and what the finished ones took."""

    status: NDArray[np.uint8]
    cause: NDArray[np.int16]
    seconds: float = 0.0
    cells: int = 0


class Tally:
    """What a journal says, entry by entry.

    Parameters
    ----------
    units : number of units of each group; entries of others are ignored.
    """

    def __init__(self, units: Mapping[str, int]) -> None:
        self.groups = {
            name: GroupTally(status=np.full(n, UNTOLD, dtype=np.uint8), cause=np.full(n, -1, dtype=np.int16))
            for name, n in units.items()
        }
        self.pace, self.causes = Pace(), Causes()
        self.replicas: dict[int, ReplicaTally] = {}
        self.bytes = self.row_forwards = self.gpu_bytes = self.retries = self.losses = self.entries = 0
        self.longest = 0.0
        self.heard: float | None = None

    def add(self, entry: Mapping[str, Any]) -> None:
        """Take the next entry; what is not in one is passed over, as the journal may be of another version."""
        self.entries += 1
        time = _number(entry.get("time"))
        self.heard = time if self.heard is None else max(self.heard, time)
        if "retried" in entry:
            self._retry(entry, time)
            return
        group, index = self.groups.get(str(entry.get("group"))), entry.get("index")
        if group is None or type(index) is not int or not 0 <= index < len(group.status):
            return
        where = f"{entry['group']} {index}"
        if entry.get("unset"):
            self._settle(group, index, PENDING)
        elif entry.get("skipped"):
            # No replica took any time for it.
            self._settle(group, index, DONE)
        elif entry.get("error"):
            self._settle(group, index, FAILED, self.causes.number(str(entry["error"]), where, time))
        else:
            self._finish(group, index, entry, where, time)

    def failures(self) -> list[Cause]:
        """List the causes of failures and retries, the worst first."""
        return self.causes.ranked()

    def recent_replicas(self, seconds: float) -> Iterator[ReplicaTally]:
        """Yield replicas that were heard of in the last seconds of the journal, by number."""
        for number in sorted(self.replicas):
            if self.heard is not None and self.heard - self.replicas[number].heard <= seconds:
                yield self.replicas[number]

    def _finish(self, group: GroupTally, index: int, entry: Mapping[str, Any], where: str, time: float) -> None:
        cells, seconds, failed = _count(entry.get("cells")), _number(entry.get("seconds")), _count(entry.get("failed"))
        cause = -1
        if failed:
            cause = self.causes.number(f"{failed} of {cells} cells are not finite", where, time, cause=NOT_FINITE)
        self._settle(group, index, FAILED if failed else DONE, cause)
        group.seconds, group.cells = group.seconds + seconds, group.cells + cells
        self.bytes += _count(entry.get("bytes"))
        self.row_forwards += _count(entry.get("row_forwards"))
        self.longest = max(self.longest, seconds)
        self.pace.add(time, seconds, cells)
        peak = _count(entry.get("gpu_bytes"))
        self.gpu_bytes = max(self.gpu_bytes, peak)
        if (replica := self._replica(entry)) is not None:
            replica.units, replica.cells, replica.seconds = (
                replica.units + 1, replica.cells + cells, replica.seconds + seconds
            )  # fmt: skip
            replica.last, replica.heard, replica.gpu_bytes = where, time, max(replica.gpu_bytes, peak)
            replica.recent.append((cells, seconds))

    def _settle(self, group: GroupTally, index: int, status: int, cause: int = -1) -> None:
        before = int(group.cause[index])
        if before >= 0:
            self.causes[before].units -= 1
        if cause >= 0:
            self.causes[cause].units += 1
        group.status[index], group.cause[index] = status, cause

    def _retry(self, entry: Mapping[str, Any], time: float) -> None:
        unit, replica, error = entry.get("unit"), self._replica(entry), str(entry["retried"])
        if replica is not None:
            replica.heard = time
        if unit is None:
            where = "" if replica is None else f"replica {replica.replica}"
            self.losses += 1
            self.causes[self.causes.number(error, where, time)].losses += 1
            if replica is not None:
                replica.losses += 1
        else:
            self.retries += 1
            self.causes[self.causes.number(error, f"unit {unit}", time)].retries += 1

    def _replica(self, entry: Mapping[str, Any]) -> ReplicaTally | None:
        number = entry.get("replica")
        if type(number) is not int:
            return None
        # Put last, so that the first is always the one that was not heard of for longest.
        found = self.replicas.pop(number, None) or ReplicaTally(replica=number)
        if len(self.replicas) >= MOST_REPLICAS:
            del self.replicas[next(iter(self.replicas))]
        self.replicas[number] = found
        return found


def _number(value: Any) -> float:
    usable = type(value) in (int, float) and 0 < value < _LARGEST
    return float(value) if usable else 0.0


def _count(value: Any) -> int:
    return value if type(value) is int and 0 < value < _LARGEST else 0
