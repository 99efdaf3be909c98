"""How a unit ended, read from a line of a journal that anyone may have written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

MOST = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One finished attempt.

    Attributes
    ----------
    group, index : the unit. failed : whether it raised, or holds a cell without a finite value.
    failed_cells : how many such cells.
    """

    group: str
    index: int
    failed: bool
    failed_cells: int


def outcome(entry: object) -> Outcome | None:
    """Return what a parsed line says of a unit; None if it is of another kind, or makes no sense."""
    if not isinstance(entry, dict):
        return None
    group: object = entry.get("group")
    index: object = entry.get("index")
    cells: object = entry.get("failed", 0)
    if not isinstance(group, str) or not _is_count(index) or not _is_count(cells):
        return None
    return Outcome(group=group, index=index, failed=bool(entry.get("error") or cells), failed_cells=cells)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST
