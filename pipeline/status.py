"""How far a store is: units done, pending and failed in each group."""

from __future__ import annotations

from typing import Any

from pipeline.store import DONE, FAILED, PENDING, Journal, Place, open_store, status_of


def summarise(place: Place) -> list[dict[str, Any]]:
    """Count units by status for every group that has one; finished units still in the journal only are counted.

    Raises
    ------
    StoreError : the place is not a store.
    """
    store = open_store(place)
    found = {name: store.status(name) for name in store.groups()}
    for entry in Journal(store.location).entries():
        status, index = status_of(entry), entry.get("index", 0)
        values = found.get(entry.get("group", ""))
        if status is not None and values is not None and 0 <= index < len(values):
            values[index] = status
    rows = []
    for name, values in found.items():
        counts = {
            word: int((values == code).sum())
            for word, code in (("done", DONE), ("pending", PENDING), ("failed", FAILED))
        }
        rows.append({"group": name, "units": len(values), **counts})
    return rows
