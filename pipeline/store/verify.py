"""Verification: every chunk of every finished unit is read again, and what is not as it was written is undone."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.plan import BASELINE
from pipeline.precision import LOOK_SAMPLES, STOPPED
from pipeline.screening import DRAWN, ESTIMATE, EXACT, OPEN
from pipeline.store.accounts import DIGEST_CHARACTERS, count_failed, digest_of
from pipeline.store.contents import EFFECTS, PREVIEWS, Contents, MissingError, chunk_keys, consolidated, metadata_of
from pipeline.store.errors import CorruptedError, reading
from pipeline.store.journal import DONE, FAILED, PENDING, Journal
from pipeline.store.lease import Lease
from pipeline.store.location import Place
from pipeline.store.opening import open_store
from pipeline.store.regions import Store
from pipeline.store.states import ends

log = logging.getLogger(__name__)

UNREADABLE, MISSING, CHANGED = "unreadable", "missing", "not what was written"
HOLES, WHOLE = "done, with cells without a value", "failed, with a value in every cell"
_DIGEST = re.compile(rf"[0-9a-f]{{{DIGEST_CHARACTERS}}}")
_READERS = 8
_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BadUnit:
    """A unit whose values are not those that its replica wrote, and why."""

    group: str
    index: int
    cause: str


@dataclass(slots=True, kw_only=True)
class Findings:
    """What a verification found, and undid.

    Attributes
    ----------
    units : units of the store. checked : done or failed ones that were read. bad : of them, now pending again.
    undigested : checked units whose receipt is not in the journal, so that only checksums and NaN speak for them.
    rebuilt : status arrays and selections that could not be read and were written anew.
    template : parts of the template that are damaged; the next run restores them.
    effects : parts of the effects that are damaged.
    unchecked : groups whose units could not be checked, because the description of their arrays is damaged.
    skipped_lines : lines of the journal that make no sense; the last one may have been torn by a kill.
    leftovers : temporary files of killed writers; they were part of nothing, and are deleted.
    """

    units: int = 0
    checked: int = 0
    bad: list[BadUnit] = field(default_factory=list)
    undigested: int = 0
    rebuilt: list[str] = field(default_factory=list)
    template: list[str] = field(default_factory=list)
    effects: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    skipped_lines: int = 0
    leftovers: int = 0

    @property
    def good(self) -> bool:
        """Whether nothing was found."""
        return not (self.bad or self.rebuilt or self.template or self.effects or self.unchecked)

    def causes(self) -> dict[str, int]:
        """Count the bad units by cause."""
        counts: dict[str, int] = {}
        for unit in self.bad:
            counts[unit.cause] = counts.get(unit.cause, 0) + 1
        return counts

    def as_dict(self) -> dict[str, Any]:
        """Return the findings as plain data."""
        return {"good": self.good, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Receipts:
    """What status and journal say of the units of one group.

    Attributes
    ----------
    states : one a unit. digests : bytes of the last receipt's digest. known : whether there is one.
    raised : units that failed without a result, so that anything or nothing may be stored.
    """

    states: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    known: NDArray[np.bool_]
    raised: NDArray[np.bool_]

    @classmethod
    def of(cls, states: NDArray[np.uint8]) -> Receipts:
        """Start from a status array."""
        n = len(states)
        digests = np.zeros((n, DIGEST_CHARACTERS // 2), dtype=np.uint8)
        return cls(states.copy(), digests, np.zeros(n, dtype=np.bool_), states == FAILED)

    def take(self, index: int, state: int, entry: dict[str, Any]) -> None:
        """Take in a line of the journal."""
        digest = str(entry.get("digest", ""))
        self.states[index] = state
        self.raised[index] = bool(entry.get("error"))
        self.known[index] = state != PENDING and not self.raised[index] and bool(_DIGEST.fullmatch(digest))
        if self.known[index]:
            self.digests[index] = np.frombuffer(bytes.fromhex(digest), dtype=np.uint8)

    def digest(self, index: int) -> str:
        """Return the digest of a unit's receipt."""
        return self.digests[index].tobytes().hex()


def verify(place: Place, *, say: Callable[[str], None] | None = None) -> Findings:
    """Read every chunk of every done or failed unit again; units that are not as they were written become pending.

    Holds the store's lease meanwhile. Memory does not grow with the size of the store, but for a few bytes a unit.

    Parameters
    ----------
    say : told about an earlier driver that has to be waited for or was taken over from.

    Raises
    ------
    StoreError : the place is no store, is being driven, or cannot be reached.
    """
    store = open_store(place)
    lease = Lease(store.location, say=say)
    lease.acquire()
    journal = Journal(store.location, lease.generation, lease.check)
    try:
        return _Verification(store, journal, lease).run()
    finally:
        try:
            journal.close()
        finally:
            lease.release()


class _Verification:
    def __init__(self, store: Store, journal: Journal, lease: Lease) -> None:
        self.store, self.journal, self.lease = store, journal, lease
        self.found = Findings()
        self.nodes = consolidated(self.store.location)
        self.contents = Contents(self.store, self.nodes)
        self.damaged: set[str] = set()

    def run(self) -> Findings:
        self.found.leftovers = self.store.sweep_partial_files()
        self._check_descriptions()
        self._check_template()
        groups = [g for g in self.contents.groups if not self.contents.needs(g) & self.damaged]
        self.found.unchecked = sorted({*self.found.unchecked, *self.contents.groups} - set(groups))
        receipts = self._read_receipts(groups)
        for group in groups:
            if group in self.contents.screened:
                self._check_selection(group, bool((receipts[group].states != PENDING).any()))
            if group in self.contents.in_rounds:
                self._check_looks(group, receipts[group].states)
            self._check_units(group, receipts[group])
        self._check_effects()
        return self.found

    def _check_descriptions(self) -> None:
        """Compare the metadata of every group and array with what the root repeats of it."""
        if not self.nodes:
            self.found.template.append("zarr.json (consolidated metadata)")
            self.found.unchecked = self.store.groups()
        for path, node in self.nodes.items():
            if metadata_of(self.store.location.read(f"{path}/zarr.json")) != node:
                group = path.partition("/")[0]
                (self.found.effects if group == EFFECTS else self.found.template).append(f"{path}/zarr.json")
                self.damaged.add(group)

    def _check_template(self) -> None:
        for path in self.contents.template:
            if path.partition("/")[0] not in self.damaged and (cause := self.contents.damage(path)):
                self.found.template.append(f"{path} ({cause})")
                if path == f"{PREVIEWS}/preview":
                    # Without it nobody knows whose previews they are.
                    self.damaged.add(PREVIEWS)
                if path.endswith(f"/{LOOK_SAMPLES}"):
                    # Nor which round a unit is of.
                    self.damaged.add(path.partition("/")[0])

    def _check_effects(self) -> None:
        if EFFECTS not in self.damaged:
            damage = {path: self.contents.damage(path) for path in self.contents.effects}
            self.found.effects += [f"{path} ({cause})" for path, cause in damage.items() if cause]

    def _read_receipts(self, groups: list[str]) -> dict[str, Receipts]:
        receipts = {group: Receipts.of(self._read_status(group)) for group in groups}
        for group, index, state, entry in ends(self.journal, {g: r.states for g, r in receipts.items()}):
            receipts[group].take(index, state, entry)
        self.found.skipped_lines = self.journal.skipped
        for group in groups:
            self.found.units += len(receipts[group].states)
            if f"{group}/status" in self.found.rebuilt:
                self._write_status(group, receipts[group].states)
        return receipts

    def _read_status(self, group: str) -> NDArray[np.uint8]:
        """Read a status array; one that is damaged starts all pending, and the journal fills it."""
        array = self.store.array(f"{group}/status")
        try:
            states = self.store.status(group)
        except CorruptedError:
            states = None
        if states is None or not all(self.store.location.exists(key) for key in chunk_keys(array)):
            self.found.rebuilt.append(f"{group}/status")
            return np.full(array.shape, PENDING, dtype=np.uint8)
        return states

    def _check_selection(self, group: str, used: bool) -> None:
        """Reset a selection that cannot be read, or is gone although units have used it."""
        try:
            open_ = {}
            for name in (EXACT, DRAWN):
                with reading(self.store.location, f"{group}/{name}"):
                    open_[name] = bool((np.asarray(self.store.array(f"{group}/{name}")[...]) == OPEN).any())
            # The second is written first.
            lost = used if open_[EXACT] else open_[DRAWN]
        except CorruptedError:
            lost = True
        if lost:
            self.lease.check()
            self.store.reset_selection(group)
            self.found.rebuilt.append(f"{group}/{EXACT}")

    def _check_looks(self, group: str, states: NDArray[np.uint8]) -> None:
        """Reset looks that cannot be read, or are gone although units of a later round have used them."""
        count, _ = self.contents.windows(group)
        for look, samples in enumerate(self.contents.in_rounds[group]):
            try:
                used = bool((states[samples * count :] != PENDING).any())
                lost = used and self.store.stopped(group, look) is None
            except CorruptedError:
                lost = True
            if lost:
                self.lease.check()
                self.store.reset_look(group, look)
                self.found.rebuilt.append(f"{group}/{STOPPED}[{look}]")

    def _check_units(self, group: str, receipts: Receipts) -> None:
        due = np.flatnonzero((receipts.states != PENDING) & ~self.contents.never_stored(group))
        before = len(self.found.bad)
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(due), _BATCH):
                batch = [int(index) for index in due[start : start + _BATCH]]
                for index, cause in zip(batch, pool.map(lambda i: self._judge(group, i, receipts), batch), strict=True):
                    if cause:
                        self.found.bad.append(BadUnit(group=group, index=index, cause=cause))
        self.found.checked += len(due)
        self.found.undigested += int((~receipts.known & ~receipts.raised)[due].sum())
        bad = self.found.bad[before:]
        if bad:
            for unit in bad:
                self.journal.append(group=unit.group, index=unit.index, unset=unit.cause)
                receipts.states[unit.index] = PENDING
            # The journal first: of a unit that only the status calls pending it would say again that it is done.
            self.journal.flush()
            self._write_status(group, receipts.states)

    def _judge(self, group: str, index: int, receipts: Receipts) -> str:
        """Return what is wrong with a unit; empty if nothing is."""
        raised = bool(receipts.raised[index])
        try:
            values = self.contents.values(group, index)
        except MissingError:
            return "" if raised else MISSING
        except CorruptedError:
            return UNREADABLE
        if raised:
            return ""
        if receipts.known[index] and digest_of(values) != receipts.digest(index):
            return CHANGED
        failed = self._failed_cells(group, index, values)
        if failed is None:
            return ""
        if receipts.states[index] == DONE:
            return HOLES if failed else ""
        return "" if failed else WHOLE

    def _failed_cells(self, group: str, index: int, values: dict[str, NDArray[Any]]) -> int | None:
        """Count computed cells without a value; None while it is not known which are computed."""
        if group == BASELINE:
            estimates = sum(int(np.isnan(v).sum()) for path, v in values.items() if path.endswith(f"/{ESTIMATE}"))
            recorded = {p: v for p, v in values.items() if p.startswith(f"{BASELINE}/")}
            return estimates + count_failed(recorded, 1)
        axes = self.contents.cell_axes(self.contents.metrics[group][0])
        look = self.contents.look_before(group, index) if group in self.contents.in_rounds else None
        if group not in self.contents.screened and look is None:
            return count_failed(values, axes)
        count, width = self.contents.windows(group)
        start = (index % count) * width
        if look is not None:
            stopped = self.store.stopped(group, look, start, start + width)
            chosen = None if stopped is None else ~stopped.ravel()
        else:
            chosen = self.store.chosen(group, start, start + width)
        if chosen is None:
            return None
        return count_failed({p: v.reshape(chosen.size, *v.shape[axes:])[chosen] for p, v in values.items()}, 1)

    def _write_status(self, group: str, states: NDArray[np.uint8]) -> None:
        self.lease.check()
        self.store.write_status(group, states)


def advice(findings: Findings, place: Place) -> Iterator[str]:
    """Yield what to do next, one sentence each."""
    again = f"stepscope run CONFIG --store {place}"
    if findings.bad or findings.template or findings.rebuilt:
        yield f"Run the same command again, it repairs the rest: {again}"
    if findings.unchecked:
        groups = ", ".join(findings.unchecked)
        yield f"Then verify once more, as {groups} could not be checked: stepscope verify {place}"
    if findings.effects:
        yield f"Compute the effects again: stepscope effects {place}"
