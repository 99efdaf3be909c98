"""The driver's lock on a store: one driver at a time, and none that a dead one holds."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys

import pytest

from pipeline.store import (
    DriverLock,
    StoreError,
)


class TestLock:
    def test_second_holder_is_refused_with_the_first(self, tmp_path):
        first, second = DriverLock(tmp_path), DriverLock(tmp_path)
        first.acquire()
        with pytest.raises(
            StoreError,
            match=rf"^store {tmp_path} is being driven by process {os.getpid()} on .+\. Wait for it or stop it\.$",
        ):
            second.acquire()
        first.release()
        second.acquire()
        second.release()

    def test_refused_attempt_does_not_harm_the_holder(self, tmp_path):
        first = DriverLock(tmp_path)
        first.acquire()
        for _ in range(2):
            with pytest.raises(StoreError, match=f"process {os.getpid()}"):
                DriverLock(tmp_path).acquire()
        first.release()

    def test_release_without_lock_is_nothing(self, tmp_path):
        lock = DriverLock(tmp_path)
        lock.release()
        lock.acquire()
        lock.release()
        lock.release()

    def test_dead_process_holds_nothing(self, tmp_path):
        path = str(tmp_path / "driver.lock")
        code = (
            f"import fcntl, os; f = open({path!r}, 'a+'); fcntl.flock(f, fcntl.LOCK_EX); "
            "f.write('ghost'); f.flush(); os._exit(9)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
        lock = DriverLock(tmp_path)
        lock.acquire()
        lock.release()
        assert "ghost" not in lock.path.read_text()

    def test_other_process_holds_it(self, tmp_path):
        code = (
            f"import fcntl; f = open({str(tmp_path / 'driver.lock')!r}, 'a+'); fcntl.flock(f, fcntl.LOCK_EX); "
            "f.write('process 7 on node-3'); f.flush(); print('held', flush=True); input()"
        )
        holder = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(StoreError, match=r"is being driven by process 7 on node-3\."):
                DriverLock(tmp_path).acquire()
        finally:
            holder.communicate("\n", timeout=30)
        DriverLock(tmp_path).acquire()

    def test_place_that_cannot_be_written_is_one_sentence(self, tmp_path):
        (tmp_path / "driver.lock").mkdir()
        with pytest.raises(
            StoreError, match=rf"^store {tmp_path} cannot be written: Is a directory: .*driver\.lock\.$"
        ):
            DriverLock(tmp_path).acquire()

    def test_file_is_locked_for_others_by_the_operating_system(self, tmp_path):
        lock = DriverLock(tmp_path)
        lock.acquire()
        with lock.path.open("a") as handle, pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.release()
