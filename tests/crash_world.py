"""A world for drivers that crash: one real store, processes on machines, one clock, kills between any two writes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pipeline.ledger
import pipeline.store.restore
import pipeline.sweep
from pipeline.screening import DRAWN, EXACT
from pipeline.store import Journal, Lease, LeaseLostError, Location, Store
from pipeline.store.lease import Holder
from pipeline.store.location import Bucket, Folder
from tests.crash_oracle import OPEN, Oracle, reference, template
from tests.synthetic import SyntheticReplica, shapes_of

TTL = 30.0
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
LOCAL_JOURNAL = "journal.jsonl"


class Killed(BaseException):
    """The end of a process: whatever it would write after that does not happen."""


@dataclass(eq=False)
class Process:
    """A process that drives or verifies; ``state`` is alive, frozen or dead."""

    number: int
    machine: int
    state: str = "alive"

    @property
    def holder(self) -> Holder:
        """What it calls itself in a lease."""
        where = f"machine {self.machine}"
        return Holder(host=where, process=self.number, started=str(self.number), boot=where, namespace=where)


class OneByOne:
    """A pool of no threads, as they would only cost time."""

    def __init__(self, threads: int) -> None:
        self.map = map

    def __enter__(self) -> OneByOne:
        return self

    def __exit__(self, *raised: object) -> None:
        """Nothing is left to wait for."""


class World:
    """See the module.

    Parameters
    ----------
    bucket : whether the store lies in a bucket, kept in memory, or in a folder.

    Attributes
    ----------
    holder : who was given the lease last and has not released it, as the storage saw it.
    actor : the process that acts. thaws : when a frozen holder wakes up while another process waits for its lease.
    violations : what a process did that had no right to.
    """

    def __init__(self, *, bucket: bool) -> None:
        self.plan = reference().plan
        self.now = 1000.0
        self.processes: list[Process] = []
        self.leases: dict[Process, Lease] = {}
        self.actor: Process | None = None
        self.holder: Process | None = None
        self.thaws = "never"
        self.violations: list[str] = []
        self._fuse: int | None = None
        self._blown = False
        self._share = 0.0
        self._folder = Path(tempfile.mkdtemp(prefix="machine_", dir=MEMORY))
        self.location = _bucket(self) if bucket else _watched(Folder, self, self._folder / "run.zarr")
        for key, value in reference().template.items():
            self.location.put(key, value)
        self.oracle = Oracle(self.location)
        self._patch = pytest.MonkeyPatch()
        _watch(self, self._patch)
        self.replica = SyntheticReplica(shapes_of(self.plan), self.location)

    def close(self) -> None:
        """Undo everything."""
        self._patch.undo()
        shutil.rmtree(self._folder)

    def start(self, machine: int) -> Process:
        """Start a process."""
        self.processes.append(Process(number=len(self.processes), machine=machine))
        return self.processes[-1]

    def lease(self, process: Process, say: Callable[[str], None] | None = None) -> Lease:
        """Return a lease for a process, by the process's own clock; ``beat_all`` is its heartbeat."""

        def told(text: str) -> None:
            if "nothing heard of" in text and self.thaws == "at the last moment":
                self._thaw_holder(process)

        def sleep(seconds: float) -> None:
            self.now += seconds
            if self.thaws == "in between":
                self._thaw_holder(process)
            self.beat_all()

        ahead = 17.0 * process.number
        self.leases[process] = Lease(
            self.location,
            ttl=TTL,
            holder=process.holder,
            clock=lambda: self.now + ahead,
            sleep=sleep,
            lives=lambda holder: self.processes[holder.process].state != "dead",
            say=told,
            beats=False,
        )
        return self.leases[process]

    def beat_all(self) -> None:
        """Let every living holder of a lease say that it lives, as its thread does."""
        for process, lease in self.leases.items():
            if process.state == "alive" and lease.generation:
                with self.acting(process), self._unharmed():
                    try:
                        lease.beat()
                    except LeaseLostError:
                        if process is self.holder:
                            self.violations.append(f"{process} holds the store and is told that it does not")

    def _thaw_holder(self, waiting: Process) -> None:
        if self.holder is not None and self.holder is not waiting and self.holder.state == "frozen":
            self.holder.state = "alive"
            self.beat_all()

    def refuses(self, machine: int) -> bool:
        """Whether a process that starts on a machine must not get the lease."""
        holder = self.holder
        if holder is None or holder.state == "dead":
            return False
        return holder.machine == machine or holder.state == "alive" or self.thaws == "in between"

    @contextmanager
    def acting(self, process: Process) -> Iterator[None]:
        """Do something as a process."""
        before, self.actor = self.actor, process
        try:
            yield
        finally:
            self.actor = before

    @contextmanager
    def killing(self, process: Process, after: int | None, share: float) -> Iterator[None]:
        """Do something as a process that is killed after some writes; None for never.

        Parameters
        ----------
        share : part of the next write that still happens, where a write has parts.
        """
        self._fuse, self._blown, self._share = after, False, share
        try:
            with self.acting(process):
                yield
        except Killed:
            process.state = "dead"
        finally:
            self._fuse, self._blown = None, False

    @contextmanager
    def _unharmed(self) -> Iterator[None]:
        """Do something that another process does than the one that is killed."""
        before = self._fuse, self._blown
        self._fuse, self._blown = None, False
        try:
            yield
        finally:
            self._fuse, self._blown = before

    def is_cut(self) -> bool:
        """Count a write, and return whether it is the one that a kill cuts short.

        Raises
        ------
        Killed : the process is dead already.
        """
        if self._blown:
            raise Killed
        if self._fuse is not None:
            self._fuse -= 1
            self._blown = self._fuse < 0
        return self._blown

    def part_of(self, size: int) -> int:
        """Return how much of a write that is cut short happens."""
        return int(self._share * size)

    def only_holder(self, what: str) -> None:
        """Note a write that nobody but the holder of the lease may do."""
        if self.actor is not self.holder:
            self.violations.append(f"{self.actor} wrote {what}, and {self.holder} holds the store")

    def leave_partial(self, key: str) -> None:
        """Leave what a writer leaves that is killed in a folder."""
        if isinstance(self.location, Folder):
            unfinished = self.location.path / f"{key}.{len(self.processes)}.partial"
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(b"torn")

    def partial_files(self) -> list[str]:
        """Return the unfinished files that lie in the store."""
        return [path.name for path in self._folder.rglob("*.partial")]


def _watched(kind: Any, world: World, *given: Any) -> Any:
    """Return a location whose writes a kill can cut off; it sees who takes and releases the lease."""

    class Watched(kind):
        def write(self, key: str, data: bytes) -> None:
            self._begin(key)
            super().write(key, data)
            if key.startswith("lease/") and json.loads(data)["released"] and world.actor is world.holder:
                world.holder = None

        def create(self, key: str, data: bytes) -> bool:
            self._begin(key)
            created = super().create(key, data)
            if created and key.startswith("lease/"):
                world.holder = world.actor
            return bool(created)

        def put(self, key: str, data: bytes) -> None:
            super().write(key, data)

        def _begin(self, key: str) -> None:
            if world.is_cut():
                world.leave_partial(key)
                raise Killed
            if key.startswith("journal/"):
                world.only_holder(key)

    return Watched(*given)


def _bucket(world: World) -> Any:
    from obstore.store import MemoryStore

    location = _watched(Bucket, world, "s3://bucket/run.zarr")
    location.__dict__["objects"] = MemoryStore()
    return location


def _watch(world: World, patch: pytest.MonkeyPatch) -> None:
    """Give drivers the clock and the leases of a world, and let it cut off what they write."""
    patch.setattr(pipeline.ledger, "time", SimpleNamespace(monotonic=lambda: world.now))
    # A function of the plan, and most of the time that opening a store takes.
    patch.setattr(pipeline.store.restore, "template_of", lambda plan: template())
    for module in (pipeline.sweep, sys.modules["pipeline.store.verify"]):
        patch.setattr(module, "Lease", lambda place, say=None: world.lease(world.actor, say))
    for module in (pipeline.store.restore, sys.modules["pipeline.store.verify"]):
        patch.setattr(module, "ThreadPoolExecutor", OneByOne)
    # How well estimates rank is no matter here.
    patch.setattr(pipeline.sweep, "_judge", lambda *given, **more: False)
    patch.setattr(Journal, "append", _append(world, Journal.append))
    for name in ("write_status", "write_selection", "reset_selection"):
        patch.setattr(Store, name, _service(world, name, getattr(Store, name)))
    for name in ("write_cells", "write_sample"):
        patch.setattr(Store, name, _values(world, getattr(Store, name)))


def _append(world: World, append: Any) -> Any:
    def watched(journal: Journal, **entry: Any) -> None:
        if not isinstance(journal.location, Folder):
            if world.is_cut():
                raise Killed
            append(journal, **entry)
            return
        path = journal.location.path / LOCAL_JOURNAL
        before = path.stat().st_size if path.exists() else 0
        cut = world.is_cut()
        append(journal, **entry)
        world.only_holder("a line of the journal")
        if cut:
            with path.open("r+b") as handle:
                handle.truncate(before + world.part_of(path.stat().st_size - before))
            raise Killed

    return watched


def _service(world: World, name: str, write: Any) -> Any:
    """Watch what drivers write: status, and selections, which are two arrays."""

    def watched(store: Store, group: str, *given: Any) -> None:
        cut = world.is_cut()
        if cut and world.part_of(2) and name != "write_status":
            first = DRAWN if name == "write_selection" else EXACT
            array = store.array(f"{group}/{first}")
            array[...] = given[0].drawn.astype(np.uint8) if given else np.full(array.shape, OPEN, dtype=np.uint8)
        if cut:
            raise Killed
        world.only_holder(f"{group} ({name})")
        write(store, group, *given)

    return watched


def _values(world: World, write: Any) -> Any:
    """Watch what replicas write that run in the process of a driver."""

    def watched(store: Store, group: str, values: Any, *where: Any) -> Any:
        if world.is_cut():
            world.leave_partial(f"{group}/{next(iter(values))}/c/0")
            raise Killed
        return write(store, group, values, *where)

    return watched


def raw_write(location: Location, key: str, content: bytes | None) -> None:
    """Change a key as a disk may: nobody's write. None deletes it."""
    if content is None:
        location.delete(key)
    else:
        location.put(key, content)  # type: ignore[attr-defined]
