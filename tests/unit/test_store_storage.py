"""Storage that is full or read-only: a sentence that names the region, told from other failures by its name."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zarr.storage import LocalStore

from cluster.work import describe_error
from pipeline.plan import Plan
from pipeline.screening import Selection
from pipeline.store import (
    Journal,
    Lease,
    StorageFullError,
    StorageReadOnlyError,
    Store,
    StoreError,
    open_or_create,
    open_store,
)
from pipeline.store.errors import CorruptedError, LeaseLostError, reading, storage_error
from pipeline.store.location import Folder
from tests.planted_units import small_plan


class Refusing(LocalStore):
    """A store whose writes fail once ``code`` is set."""

    code = 0

    async def set(self, *args: Any, **kwargs: Any) -> None:
        if Refusing.code:
            raise OSError(Refusing.code, os.strerror(Refusing.code))
        await super().set(*args, **kwargs)


class RefusingFolder(Folder):
    def zarr(self, *, read_only: bool = False) -> Any:
        return Refusing(self.path, read_only=read_only)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small_plan()


@pytest.fixture
def store(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    open_or_create(tmp_path / "run.zarr", plan)
    monkeypatch.setattr(Refusing, "code", 0)
    return Store(RefusingFolder(tmp_path / "run.zarr"))


def cells(store: Store) -> dict[str, np.ndarray]:
    shape = (store.array("map/solved").chunks[1], *store.array("map/solved").shape[2:])
    return {name: np.zeros(shape, np.float32) for name in ("goal_evidence", "solved")}


def write_cells(store: Store) -> None:
    store.write_cells("map", cells(store), 0, 0, store.array("map/solved").chunks[1])


def write_baseline(store: Store) -> None:
    store.write_sample("baseline", {"solved": np.zeros(2, np.float32)}, 1)


def write_status(store: Store) -> None:
    store.write_status("map", store.status("map"))


def write_selection(store: Store) -> None:
    shape = store.array("screened/exact").shape
    store.write_selection("screened", Selection(exact=np.ones(shape, np.bool_), drawn=np.zeros(shape, np.bool_)))


@pytest.mark.parametrize(
    ("write", "region"),
    [
        pytest.param(write_cells, r"map/goal_evidence\[0, 0:2\]", id="unit"),
        pytest.param(write_baseline, r"baseline/solved\[1\]", id="baseline"),
        pytest.param(write_status, "map/status", id="status"),
        pytest.param(write_selection, "screened/exact", id="selection"),
    ],
)
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        pytest.param(errno.ENOSPC, StorageFullError, id="full"),
        pytest.param(errno.EDQUOT, StorageFullError, id="quota"),
        pytest.param(errno.EROFS, StorageReadOnlyError, id="read-only"),
        pytest.param(errno.EACCES, StorageReadOnlyError, id="denied"),
    ],
)
def test_refused_write_names_region_and_reason(store, monkeypatch, write, region, code, kind):
    monkeypatch.setattr(Refusing, "code", code)
    with pytest.raises(
        kind,
        match=rf"^cannot write region {region} of store .*run\.zarr: {os.strerror(code)}\. Finished units are safe; ",
    ):
        write(store)


def test_other_failures_of_the_disk_stay_what_they_are(store, monkeypatch):
    monkeypatch.setattr(Refusing, "code", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        write_cells(store)


@pytest.mark.parametrize(("code", "name"), [(errno.ENOSPC, "StorageFullError"), (errno.EROFS, "StorageReadOnlyError")])
def test_driver_tells_them_by_the_name_of_the_error(store, monkeypatch, code, name):
    """What a replica raises reaches the driver as text, and through Ray as a pickled exception."""
    monkeypatch.setattr(Refusing, "code", code)
    with pytest.raises(StoreError) as caught:
        write_cells(store)
    assert describe_error(caught.value).startswith(f"{name}: cannot write region map/")
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is type(caught.value)
    assert str(again) == str(caught.value)


@pytest.mark.parametrize("kind", [StoreError, CorruptedError, LeaseLostError, StorageFullError, StorageReadOnlyError])
def test_every_error_of_the_store_is_bad_input_and_survives_pickling(kind):
    assert isinstance(kind("a sentence."), StoreError)
    assert str(pickle.loads(pickle.dumps(kind("a sentence.")))) == "a sentence."


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError("no number"), OSError(errno.EIO, "x"), KeyError("x")], ids=repr
)
def test_errors_that_say_nothing_of_the_storage_have_no_sentence(error):
    assert storage_error(error, "x") is None


class TestReading:
    def test_what_makes_no_sense_is_corrupted(self):
        expected = r"^store s: map/x cannot be read: bad bytes\. Check the store with: stepscope verify s$"
        with pytest.raises(CorruptedError, match=expected), reading("s", "map/x"):
            raise RuntimeError("bad bytes")

    def test_what_may_not_be_read_is_not_corrupted(self):
        expected = r"Permission denied\. Try again later\."
        with pytest.raises(StoreError, match=expected) as caught, reading("s", "map/x"):
            raise PermissionError(13, "Permission denied")
        assert not isinstance(caught.value, CorruptedError)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 kB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k,nr_inodes=0", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"this machine does not mount tmpfs: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as handle:
        try:
            while True:
                handle.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017


def append_many(journal: Journal) -> None:
    for number in range(1, 500):
        journal.append(unit=number, error="x" * 100)


class TestRealDisk:
    def test_full_disk_stops_every_writer_with_a_sentence_and_room_lets_them_go_on(self, small_disk, plan):
        store = open_or_create(small_disk / "run.zarr", plan)
        lease, journal = Lease(store.location), Journal(store.location)
        journal.append(unit=0)
        fill(small_disk)
        with pytest.raises(StorageFullError, match=r"region map/goal_evidence\[0, 0:2\] .*No space left on device"):
            write_cells(store)
        with pytest.raises(StorageFullError, match="No space left on device"):
            lease.acquire()
        with pytest.raises(StorageFullError, match=r"journal\.jsonl: No space left on device"):
            append_many(journal)
        (small_disk / "filler").unlink()
        assert not list((small_disk / "run.zarr" / "lease").glob("*.json"))
        lease.acquire()
        journal.append(unit=1000)
        write_cells(store)
        lease.release()
        units = [entry["unit"] for entry in journal.entries()]
        assert units == [*range(len(units) - 1), 1000]
        assert (open_store(store.location).array("map/solved")[0, :2] == 0).all()

    def test_creation_on_a_full_disk_leaves_nothing(self, small_disk, plan):
        fill(small_disk)
        with pytest.raises(StoreError, match=r"^cannot create store .*No space left on device\. Choose a writable"):
            open_or_create(small_disk / "run.zarr", plan)
        assert [p.name for p in small_disk.iterdir()] == ["filler"]

    def test_read_only_disk_can_be_read_and_says_that_it_cannot_be_written(self, small_disk, plan):
        open_or_create(small_disk / "run.zarr", plan)
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        store = open_store(small_disk / "run.zarr")
        assert store.status("map").size
        with pytest.raises(StorageReadOnlyError, match=r"region map/goal_evidence\[0, 0:2\] .*Read-only file system"):
            write_cells(store)
        with pytest.raises(StorageReadOnlyError, match="Read-only file system"):
            Lease(store.location).acquire()
        with pytest.raises(StorageReadOnlyError, match=r"journal\.jsonl: Read-only file system"):
            Journal(store.location).append(unit=1)
