"""What a store holds, told byte by byte and by no code under test, and what an undisturbed sweep would have stored."""

from __future__ import annotations

import json
import tempfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from numcodecs import Zstd

from pipeline.plan import Plan
from pipeline.screening import mean_over_samples, select
from pipeline.store import Location, Store, open_or_create
from pipeline.store.template import template_of
from tests.planted_units import small_plan
from tests.synthetic import SyntheticReplica, shapes_of

PENDING, DONE, FAILED = 0, 1, 2
OPEN = 255
UnitKey = tuple[str, int]
Content = dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What an undisturbed sweep stores, key by key.

    Attributes
    ----------
    template : a store just created. right, spoiled : of each unit, as it must be and with a cell without a value.
    selection : of the screened experiment.
    """

    plan: Plan
    template: Content
    right: dict[UnitKey, Content]
    spoiled: dict[UnitKey, Content]
    selection: Content


@lru_cache
def reference() -> Reference:
    """Write a small sweep without a driver: a baseline, a plain experiment in two units a sample, a screened one."""
    cells = {"kind": "patch", "step": "all", "layer": [0, 1]}
    plan = small_plan(
        experiments={"map": cells, "screened": {**cells, "screen": {"top": 0.3, "metric": "clean_projection"}}},
        task={"name": "maze", "mazes": 2, "pairs": ["red/blue"]},
        previews={"samples": []},
        unit_cells=4,
    )
    right: dict[UnitKey, Content] = {}
    spoiled: dict[UnitKey, Content] = {}
    selection: Content = {}
    with tempfile.TemporaryDirectory() as folder:
        store = open_or_create(Path(folder) / "run.zarr", plan)
        template = seen = _content(store.location)
        replica = SyntheticReplica(shapes_of(plan), store.location)
        for unit in plan.layout:
            if unit.id == plan.layout.verifying.start:
                _choose(store, plan)
                selection, seen = _changes(seen, store.location)
            for values in (spoiled, right):
                for _, _, _, write in replica.prepare(unit, spoiled=values is spoiled)[0]:
                    write()
                values[unit.group, unit.index], now = _changes(seen, store.location)
            seen = now
    return Reference(plan=plan, template=template, right=right, spoiled=spoiled, selection=selection)


@lru_cache
def template() -> Content:
    """Return the template of the sweep, as it is made for every comparison with a store."""
    return template_of(reference().plan)


def _choose(store: Store, plan: Plan) -> None:
    for grid in plan.screened:
        name, screen = grid.experiment.name, grid.experiment.screen
        assert screen is not None
        store.write_selection(name, select(mean_over_samples(store.estimates(name)), screen))


def _content(location: Location) -> Content:
    return {key: location.read(key) or b"" for key in location.list()}


def _changes(before: Content, location: Location) -> tuple[Content, Content]:
    now = _content(location)
    return {key: value for key, value in now.items() if before.get(key) != value}, now


class Oracle:
    """Reads a store of the reference's sweep.

    Attributes
    ----------
    damaged : keys that were damaged, and are not right again.
    receiptless : units whose line in the journal was torn off later than status was written.
    """

    def __init__(self, location: Location) -> None:
        self.location, self.reference = location, reference()
        self.groups = list({unit.group: None for unit in self.reference.plan.layout})
        self.damaged: set[str] = set()
        self.receiptless: set[UnitKey] = set()

    def states(self) -> dict[UnitKey, int]:
        """Return the state of every unit, as status and journal tell it."""
        return {unit: state for unit, (state, _) in self.told().items()}

    def told(self) -> dict[UnitKey, tuple[int, bool]]:
        """Return the state of every unit, and whether it failed without a result, as far as is known."""
        told = {unit: (state, state == FAILED) for unit, state in self.status().items()}
        for entry in self.lines():
            unit = (entry.get("group"), entry.get("index"))
            if unit in told:
                raised = bool(entry.get("error"))
                failed = raised or bool(entry.get("failed"))
                told[unit] = (PENDING if entry.get("unset") else FAILED if failed else DONE, raised)
        return told

    def status(self) -> dict[UnitKey, int]:
        """Return what the status arrays alone say; one that cannot be read says nothing."""
        found = {}
        for group in self.groups:
            content = decoded(self.location.read(status_key(group)))
            values = content or bytes(self.reference.plan.layout.group_units(group))
            found.update({(group, index): value for index, value in enumerate(values)})
        return found

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of the journal that are whole, in order."""
        texts = [self.location.read(key) or b"" for key in ("journal.jsonl", *self.location.list("journal"))]
        return [entry for line in b"".join(texts).splitlines() if (entry := _entry(line)) is not None]

    def last_line(self) -> UnitKey | None:
        """Return the unit that the journal's last whole line is about."""
        lines = self.lines()
        return (lines[-1].get("group", ""), lines[-1].get("index", -1)) if lines else None

    @property
    def service_keys(self) -> list[str]:
        """Keys of status and selection."""
        return [*map(status_key, self.groups), *self.reference.selection]

    def broken(self, keys: list[str]) -> list[str]:
        """Return those of some keys that are missing or unreadable."""
        return [key for key in keys if decoded(self.location.read(key)) is None]

    def differing(self, unit: UnitKey, *, spoiled: bool = False) -> list[str]:
        """Return the keys of a unit that do not hold the right values, or the spoiled ones."""
        wanted = self.reference.right[unit] | (self.reference.spoiled[unit] if spoiled else {})
        return [key for key, value in wanted.items() if not same(self.location.read(key), value)]

    def others(self, key: str) -> list[bytes]:
        """Return other units' chunks of the same array; none where no digest tells them apart in time.

        Estimates are read when cells are chosen, and by then only their checksum speaks for them.
        """
        owner = next((unit for unit, content in self.reference.right.items() if key in content), None)
        if owner is None or owner in self.receiptless or "/estimate/" in key:
            return []
        wanted, array = self.reference.right[owner][key], key.partition("/c/")[0]
        chunks = [
            v for content in self.reference.right.values() for k, v in content.items() if k.partition("/c/")[0] == array
        ]
        return [v for v in chunks if v != wanted and len(decoded(v) or b"") == len(decoded(wanted) or b"")]

    def unreadable(self, unit: UnitKey) -> bool:
        """Whether a chunk of a unit is there and cannot be read."""
        found = (self.location.read(key) for key in self.reference.right[unit])
        return any(content is not None and decoded(content) is None for content in found)

    def estimates_differ(self) -> bool:
        """Whether some estimate of a unit that counts as done is not right."""
        states = self.states()
        return any("/estimate/" in key for u in states if states[u] == DONE for key in self.differing(u))

    def selection_is(self, values: str) -> bool:
        """Whether the selection is "right", or "open"."""
        found = {key: self.location.read(key) for key in self.reference.selection}
        if values == "open":
            return all(set(decoded(content) or b"") <= {OPEN} for content in found.values())
        return all(same(content, self.reference.selection[key]) for key, content in found.items())

    def wrong(self) -> dict[str, list[Any]]:
        """Return what no sweep may come to, by name; empty lists if all is well."""
        self._heal()
        states, written = self.states(), self.status()
        receipts = {(entry.get("group"), entry.get("index")) for entry in self.lines()}
        recorded = {unit for unit, state in written.items() if state != PENDING}
        return {
            "done and not right": [
                unit for unit, state in states.items() if state == DONE and set(self.differing(unit)) - self.damaged
            ],
            "status without receipt": sorted(recorded - receipts - self.receiptless),
            "selection not right": [
                key
                for key, value in self.reference.selection.items()
                if key not in self.damaged and not same(content := self.location.read(key), value)
                if not set(decoded(content) or b"") <= {OPEN}
            ],
        }

    def trust_done(self) -> None:
        """From now on no damage excuses a unit that counts as done: it was verified."""
        states = self.states()
        for unit, content in self.reference.right.items():
            if states[unit] == DONE:
                self.damaged -= content.keys()

    def _heal(self) -> None:
        """Forget the damage of what is right by now; of a status, of what can be read."""
        right = {key: value for content in self.reference.right.values() for key, value in content.items()}
        right |= self.reference.selection
        whole = [key for key in self.damaged & right.keys() if same(self.location.read(key), right[key])]
        status = sorted(self.damaged - right.keys())
        self.damaged -= {*whole, *status} - {*self.broken(status)}


def status_key(group: str) -> str:
    """Return the key of the one chunk of a group's status."""
    return f"{group}/status/c/0"


def same(content: bytes | None, wanted: bytes) -> bool:
    """Whether two chunks hold the same values; a bit may have flipped where it means nothing."""
    return content == wanted or (content is not None and decoded(content) == decoded(wanted))


def decoded(content: bytes | None) -> bytes | None:
    """Return the values in a chunk; None if there are none to be read."""
    try:
        return None if content is None else bytes(Zstd(checksum=True).decode(content))
    except (RuntimeError, ValueError):
        return None


def _entry(line: bytes) -> dict[str, Any] | None:
    text, mark, rest = line.rpartition(b', "crc": "')
    if not mark or rest != b'%08x"}' % zlib.crc32(text + b"}"):
        return None
    return dict(json.loads(text + b"}"))
