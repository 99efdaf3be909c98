"""How far a store is: units done, pending and failed in each group."""

from __future__ import annotations

from typing import Any

from pipeline.store import DONE, FAILED, PENDING, Place, open_store, states_of


def summarise(place: Place) -> list[dict[str, Any]]:
    """Count units by status for every group that has one; finished units still in the journal only are counted.

    Raises
    ------
    StoreError : the place is not a store, or a status array is corrupted.
    """
    rows = []
    for name, values in states_of(open_store(place)).items():
        counts = {
            word: int((values == code).sum())
            for word, code in (("done", DONE), ("pending", PENDING), ("failed", FAILED))
        }
        rows.append({"group": name, "units": len(values), **counts})
    return rows
