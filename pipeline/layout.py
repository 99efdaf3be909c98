"""Which units a sweep has: numbers to groups and positions and back, by arithmetic and without a list of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

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
class Windows:
    """How the cells of one sample of a group are cut into units.

    Attributes
    ----------
    extent : length of the group's first axis, 1 if it has none. width : positions of it that a unit takes.
    verifies : whether its cells are chosen after every sample was screened.
    """

    group: str
    extent: int
    width: int
    verifies: bool = False

    @property
    def count(self) -> int:
        """Units of one sample."""
        return -(-self.extent // self.width)

    def bounds(self, window: int) -> tuple[int, int]:
        """Return where a window starts and stops."""
        return window * self.width, min((window + 1) * self.width, self.extent)


@dataclass(frozen=True)
class Layout:
    """The units of a sweep: all of a sample together, so that its recorded runs are reused.

    A baseline unit screens as well, and the units that verify cells come after all others. ``cuts`` are the numbers of
    samples after which some experiment is looked at before it goes on.
    """

    samples: int
    groups: tuple[Windows, ...]
    cuts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.samples * (self._first + self._second)

    def __iter__(self) -> Iterator[Unit]:
        return (self.unit(number) for number in range(len(self)))

    @property
    def screening(self) -> range:
        """Numbers of the units that run before cells are chosen; the others verify."""
        return range(self.samples * self._first)

    @property
    def verifying(self) -> range:
        """Numbers of the units that compute chosen cells."""
        return range(self.samples * self._first, len(self))

    @property
    def phases(self) -> tuple[range, ...]:
        """Numbers of the units that run together, each range once all before it have run."""
        ends = [*sorted({cut for cut in self.cuts if 0 < cut < self.samples}), self.samples]
        rounds = [range(a * self._first, b * self._first) for a, b in itertools.pairwise([0, *ends])]
        return (*rounds, self.verifying)

    def group_units(self, group: str) -> int:
        """Return the units of a group, over all samples."""
        return self.samples * self._windows[group].count

    def windows(self, group: str) -> Windows:
        """Return how a group is cut; the baseline of a sample is one unit."""
        return self._windows[group]

    def unit(self, number: int) -> Unit:
        """Return a unit by its number.

        Raises
        ------
        IndexError : there is no such unit.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"unit {number} does not exist; there are units 0 to {len(self) - 1}")
        verifying = number >= self.samples * self._first
        within = number - self.samples * self._first if verifying else number
        sample, rest = divmod(within, self._second if verifying else self._first)
        for windows in self._parts[verifying]:
            if rest < windows.count:
                start, stop = windows.bounds(rest) if windows.group != BASELINE else (0, 0)
                index = sample * windows.count + rest
                return Unit(id=number, group=windows.group, index=index, sample=sample, start=start, stop=stop)
            rest -= windows.count
        raise AssertionError("a remainder lies in one of the groups")

    @cached_property
    def _windows(self) -> dict[str, Windows]:
        baseline = Windows(group=BASELINE, extent=1, width=1)
        return {windows.group: windows for windows in (baseline, *self.groups)}

    @cached_property
    def _parts(self) -> tuple[tuple[Windows, ...], tuple[Windows, ...]]:
        every = tuple(self._windows.values())
        return tuple(w for w in every if not w.verifies), tuple(w for w in every if w.verifies)

    @cached_property
    def _first(self) -> int:
        return sum(windows.count for windows in self._parts[False])

    @cached_property
    def _second(self) -> int:
        return sum(windows.count for windows in self._parts[True])
