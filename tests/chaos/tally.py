"""What the trials come to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Tally:
    """Counts of one trial, or of all.

    Attributes
    ----------
    kills : what was done to running sweeps. faults : what happened inside units. damage : what was done to stores.
    damaged : units called done whose values were wrong or unreadable when a verification began, and arrays of no unit.
    found : of them, those that it found. missed : those that it did not. false_alarms : good units that it undid.
    recomputed : units that ran to their end again. refused : drivers that met a living one.
    taken_over : drivers that found themselves deposed and stopped.
    lost : units that were never done. wrong : units, arrays or metadata that differ from the undisturbed run.
    broken : promises that were broken on the way, in words: a traceback, a driver that was not refused.
    """

    trials: int = 0
    drivers: int = 0
    verifications: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    damage: Counter[str] = field(default_factory=Counter)
    damaged: int = 0
    found: int = 0
    missed: int = 0
    false_alarms: int = 0
    recomputed: int = 0
    refused: int = 0
    taken_over: int = 0
    lost: int = 0
    wrong: int = 0
    broken: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing was lost, wrong, missed, undone for nothing, or broken."""
        return not (self.lost or self.wrong or self.missed or self.false_alarms or self.broken)

    def add(self, other: Tally) -> None:
        """Add the counts of another tally."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(mine, Counter):
                mine.update(value)
            else:
                setattr(self, name, mine + value)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as plain data, with sums of what is counted by kind."""
        counts: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Counter):
                counts[f"{name}_in_all"] = value.total()
                counts[name] = dict(sorted(value.items()))
            else:
                counts[name] = value
        return counts

    def line(self) -> str:
        """Return a trial's counts on one line."""
        counters = (self.kills, self.faults, self.damage)
        did = [f"{what} {count}" for counter in counters for what, count in counter.items()]
        amiss = {"LOST": self.lost, "WRONG": self.wrong, "MISSED": self.missed, "UNDONE": self.false_alarms}
        result = "ok" if self.clean else f"{' '.join(f'{k} {v}' for k, v in amiss.items() if v)} {self.broken}"
        return f"{'; '.join(did) or 'nothing'}: {self.found} found, {self.recomputed} recomputed, {result}"
