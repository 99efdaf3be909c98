"""How far a store is: units done, pending and failed in each group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.outcomes import outcome
from pipeline.store import DONE, FAILED, PENDING, Journal, open_store


def summarise(path: Path) -> list[dict[str, Any]]:
    """Count units by status for every group that has one; finished units still in the journal only are counted.

    Raises
    ------
    StoreError : the path is not a store.
    """
    store = open_store(path)
    found = (outcome(entry) for entry in Journal(path).entries())
    journaled = {(o.group, o.index): o for o in found if o is not None}
    rows = []
    for name in store.groups():
        values = store.status(name)
        for (where, index), ended in journaled.items():
            if where == name and index < len(values):
                values[index] = FAILED if ended.failed else DONE
        counts = {
            word: int((values == code).sum())
            for word, code in (("done", DONE), ("pending", PENDING), ("failed", FAILED))
        }
        rows.append({"group": name, "units": len(values), **counts})
    return rows
