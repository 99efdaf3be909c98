"""Errors by cause: texts that differ only in numbers, paths and ids are one cause."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

NOT_FINITE = "cells without a finite value"
"""The cause of a unit that finished with NaN in some of its cells."""
OTHERS = "other causes"
MOST_CAUSES = 200
"""Causes that are told apart; a journal in which every text is another one must not fill the memory."""

_LONGEST = 300
_READ = 2000
_PARTS = (
    ("<path>", re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>,;)\]]+", re.IGNORECASE)),
    ("<path>", re.compile(r"(?<![\w<>.~-])(?:~|\.{1,2})?(?:/[\w.@%+=-]+)+/?")),
    ("<path>", re.compile(r"(?<![\w/])(?:[\w.@%+=-]+/){2,}[\w.@%+=-]*")),
    ("<id>", re.compile(r"(?<!\w)[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?!\w)", re.IGNORECASE)),
    ("<id>", re.compile(r"(?<!\w)0x[0-9a-f]+(?!\w)|(?<!\w)(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{8,}(?!\w)", re.IGNORECASE)),
    ("<n>", re.compile(r"(?<![A-Za-z_\d])[-+]?\d+(?:\.\d+)*(?:e[-+]?\d+)?", re.IGNORECASE)),
    ("<n>, ...", re.compile(r"<n>(?:,\s*<n>)+(?:, \.\.\.)?|<n>, \.\.\.")),
)


def clean(text: str) -> str:
    """Return a text on one line without control characters, which could drive a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:_READ]).split())


@lru_cache(maxsize=4096)
def cause_of(error: str) -> str:
    """Return what an error has in common with others of its kind: its text with numbers, paths and ids blanked."""
    text = clean(error)
    for blank, pattern in _PARTS:
        text = pattern.sub(blank, text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4].rstrip() + " ..."


@dataclass(slots=True, kw_only=True)
class Cause:
    """One cause of failures.

    Attributes
    ----------
    units : units that are failed by it now. retries : attempts that it ended and that were repeated.
    losses : replicas that it took. example : the latest text. where : the unit or replica that the text is of.
    time : when that was, in seconds since the epoch.
    """

    cause: str
    units: int = 0
    retries: int = 0
    losses: int = 0
    example: str = ""
    where: str = ""
    time: float = 0.0


class Causes:
    """Counts of every cause, by a number that fits into an array of units."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._causes: list[Cause] = []

    def number(self, error: str, where: str, time: float, *, cause: str | None = None) -> int:
        """Return the number of an error's cause, and keep the error as its latest example."""
        name = cause_of(error) if cause is None else cause
        if name not in self._known and len(self._causes) >= MOST_CAUSES:
            name = OTHERS
        if name not in self._known:
            self._known[name] = len(self._causes)
            self._causes.append(Cause(cause=name))
        number = self._known[name]
        found = self._causes[number]
        found.example, found.where, found.time = clean(error)[:_LONGEST], where, time
        return number

    def __getitem__(self, number: int) -> Cause:
        return self._causes[number]

    def __iter__(self) -> Iterator[Cause]:
        return iter(self._causes)

    def ranked(self) -> list[Cause]:
        """List causes that still count, those with most failed units first."""
        counted = [c for c in self._causes if c.units or c.retries or c.losses]
        return sorted(counted, key=lambda c: (-c.units, -c.retries, -c.losses, c.cause))
