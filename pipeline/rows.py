"""How many rows share a forward: what was measured on a machine, and the rule that chooses from it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from interventions.base import Intervention
from interventions.run import loop_order, replayed_loops
from pipeline.plan import Plan

MEMORY_RATIO = 1.3
"""Most memory of a replica, as a multiple of what the bare pipeline needs for one pair of runs."""
CLOSE = 0.03
"""The smallest number is chosen whose time is within this share of the least."""
MOST_ROWS = 64
"""Rows that are tried at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One batch of so many rows: its seconds, per computed loop of the solver, and the peak memory of the process."""

    rows: int
    seconds: float
    peak: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What a model needs on a machine.

    Attributes
    ----------
    bare_peak : bytes at the peak of the bare pipeline on one pair of runs, decoded. batches : measured, by rows.
    whole : whether more rows were left out because they would not have paid or fitted.
    """

    bare_peak: int
    batches: tuple[Measured, ...]
    whole: bool

    def __post_init__(self) -> None:
        rows = [each.rows for each in self.batches]
        if not rows or rows[0] != 1 or rows != sorted(set(rows)):
            raise ValueError(f"rows of a table must start at 1 and rise: {rows}. Measure it again.")
        if self.bare_peak < 0 or any(not 0 < b.seconds < math.inf or b.peak < 0 for b in self.batches):
            raise ValueError("a table holds seconds above 0 and bytes from 0 on. Measure it again.")

    @property
    def most(self) -> int:
        """The most rows that were measured."""
        return self.batches[-1].rows

    def reaches(self, rows: int) -> bool:
        """Whether more was measured than a plan with batches of so many rows can use."""
        return self.whole or self.most >= min(rows, MOST_ROWS)

    def seconds(self, rows: int) -> float:
        """Return the seconds of a batch, between two measured ones on the line through them.

        Never more than those of a larger batch: the measurement of the smaller one was disturbed.
        """
        at = bisect_left(self.batches, rows, key=lambda each: each.rows)
        at = min(at, len(self.batches) - 1)
        least = min(each.seconds for each in self.batches[at:])
        right = self.batches[at]
        if right.rows <= rows:
            return least
        left = self.batches[at - 1]
        share = (rows - left.rows) / (right.rows - left.rows)
        return min(left.seconds, least) + share * (least - min(left.seconds, least))

    def peak(self, rows: int) -> int:
        """Return the most memory of any batch up to the next measured one."""
        at = bisect_left(self.batches, rows, key=lambda each: each.rows)
        return max(each.peak for each in self.batches[: at + 1])


def memory_limit(table: Table, capacity: int | None = None) -> int:
    """Return the bytes that a replica may use.

    Parameters
    ----------
    capacity : bytes that it can get at most; None if nobody knows.
    """
    limit = int(MEMORY_RATIO * table.bare_peak)
    return limit if capacity is None else min(limit, capacity)


def choose(table: Table, groups: Mapping[int, int], limit: int) -> int:
    """Return how many rows should share a forward.

    Of the numbers that were measured and those that cut a group into equal parts, the smallest whose time for all
    groups is within ``CLOSE`` of the least, its peak being within the limit; 1 is always allowed. Remainders count: 16
    rows are no good for groups of 18.

    Parameters
    ----------
    groups : sizes of the groups of rows that may share a forward, with the loops of the solver that each computes.
    limit : bytes.
    """
    measured = {each.rows for each in table.batches}
    sensible = [n for n in range(1, table.most + 1) if n in measured or any(_cuts_evenly(n, size) for size in groups)]
    allowed = [n for n in sensible if n == 1 or table.peak(n) <= limit]
    seconds = {n: _seconds(table, groups, n) for n in allowed}
    least = min(seconds.values())
    return next(n for n in allowed if seconds[n] <= (1 + CLOSE) * least)


def _cuts_evenly(rows: int, size: int) -> bool:
    """Whether no smaller number of rows cuts a group into as few parts."""
    return math.ceil(size / math.ceil(size / rows)) == rows


def _seconds(table: Table, groups: Mapping[int, int], rows: int) -> float:
    total = 0.0
    for size, loops in groups.items():
        whole, rest = divmod(size, rows)
        total += loops * (whole * table.seconds(rows) + (table.seconds(rest) if rest else 0.0))
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Rows of one unit that could share a forward, and the loops of the solver that the denoiser computes for them."""

    rows: tuple[Intervention, ...]
    loops: int


def sampled_groups(plan: Plan) -> Iterator[Group]:
    """Yield groups of every experiment: those of its first, middle and last unit, which stand for the others."""
    for grid in plan.grids:
        windows = plan.layout.windows(grid.experiment.name)
        for window in sorted({0, windows.count // 2, windows.count - 1}):
            cells = list(grid.interventions(range(*windows.bounds(window))))
            for members in plan.groups(cells):
                rows = tuple(cells[i] for i in members)
                schedule = rows[0].schedule
                loops = len(loop_order(schedule, plan.geometry.steps)) - replayed_loops(rows, schedule, plan.geometry)
                yield Group(rows=rows, loops=loops)


def loops_by_size(groups: Iterable[Group]) -> Counter[int]:
    """Return the loops that groups of each size compute together."""
    found: Counter[int] = Counter()
    for group in groups:
        found[len(group.rows)] += group.loops
    return found


def as_data(table: Table) -> dict[str, Any]:
    """Return a table as plain data."""
    batches = [[b.rows, b.seconds, b.peak] for b in table.batches]
    return {"bare_peak": table.bare_peak, "batches": batches, "whole": table.whole}


def from_data(data: Any) -> Table:
    """Return the table of plain data.

    Raises
    ------
    ValueError, LookupError, TypeError : it is none.
    """
    batches = tuple(Measured(rows=_whole(r), seconds=float(s), peak=_whole(p)) for r, s, p in data["batches"])
    return Table(bare_peak=_whole(data["bare_peak"]), batches=batches, whole=bool(data["whole"]))


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"expected a whole number, got {value!r}")
    return value
