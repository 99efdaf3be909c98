"""The state of every unit: what the status arrays say, and after them the journal, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.store.journal import Journal, status_of
from pipeline.store.regions import Store


def ends(journal: Journal, states: dict[str, NDArray[np.uint8]]) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    """Yield group, index, state and line of every entry that gives a unit of these groups a state, in order."""
    for entry in journal.entries():
        state, group, index = status_of(entry), entry.get("group"), entry.get("index", 0)
        if state is not None and isinstance(group, str) and group in states and 0 <= index < len(states[group]):
            yield group, index, state, entry


def states_of(store: Store) -> dict[str, NDArray[np.uint8]]:
    """Return the state of every unit of every group; what only the journal knows yet is counted.

    Raises
    ------
    StoreError : a status array is corrupted.
    """
    states = {group: store.status(group) for group in store.groups()}
    for group, index, state, _ in ends(Journal(store.location), states):
        states[group][index] = state
    return states
