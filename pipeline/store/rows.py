"""The rows of one forward of a store that leaves them to the tool: chosen once, halved at most, never raised."""

from __future__ import annotations

import json
import re
from typing import Any

from pipeline.store.errors import StoreError
from pipeline.store.location import Place, locate

FOLDER = "rows.chosen"
"""No experiment can have this name, as it has a dot."""
CHOSEN = f"{FOLDER}/chosen.json"
MOST = 1_000_000
_HALVED = re.compile(rf"{FOLDER}/halved-(\d{{7}})\.json")


class RowsRecord:
    """What a store says of the rows of one forward.

    The first number is a file that exactly one process can create. Every halving is a file whose name is the number,
    so that the number in force is the least of all, whoever writes which first.
    """

    def __init__(self, place: Place) -> None:
        self.location = locate(place)

    def read(self) -> int | None:
        """Return the number in force, None if none was chosen yet.

        Raises
        ------
        StoreError : the file of the first number is damaged.
        """
        keys = self.location.list(FOLDER)
        halved = [int(found[1]) for key in keys if (found := _HALVED.fullmatch(key))]
        if CHOSEN not in keys:
            return min(halved, default=None)
        return min([self._chosen(), *halved])

    def choose(self, rows: int, **why: Any) -> int:
        """Propose the first number; return the one in force, which may be another's.

        Parameters
        ----------
        why : kept beside the number, for people.
        """
        self.location.create(CHOSEN, _content(rows, why))
        found = self.read()
        return rows if found is None else found

    def halve(self, rows: int, **why: Any) -> int:
        """Record that so many rows were too many; return the number in force, at most half of them, at least 1."""
        fewer = max(1, rows // 2)
        found = self.read()
        if found is not None and found <= fewer:
            return found
        self.location.create(f"{FOLDER}/halved-{fewer:07d}.json", _content(fewer, why))
        return fewer

    def _chosen(self) -> int:
        try:
            rows = json.loads(self.location.read(CHOSEN) or b"")["rows"]
            if type(rows) is int and 1 <= rows <= MOST:
                return rows
        except (ValueError, LookupError, TypeError, RecursionError):
            pass
        raise StoreError(
            f"store {self.location}: {CHOSEN} does not say how many rows share a forward. Put back a copy of it; or "
            "delete it, and the number is chosen anew: units that run from then on may differ in their last digits."
        )


def _content(rows: int, why: dict[str, Any]) -> bytes:
    return json.dumps({"rows": rows, **why}).encode()
