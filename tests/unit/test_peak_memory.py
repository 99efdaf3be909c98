"""Peak memory of a piece of work, and what a process could have."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline import gpu_memory, peak_memory
from pipeline.peak_memory import capacity, host_peak, on_gpu, peak_of

MIB = 2**20


class TestHost:
    def test_what_was_held_and_is_gone_counts(self):
        idle = peak_of(lambda: None, gpu=False)
        busy = peak_of(lambda: np.ones(200 * MIB, dtype=np.uint8).sum(), gpu=False)
        assert 190 * MIB < busy - idle < 260 * MIB

    def test_earlier_work_does_not_count(self):
        peak_of(lambda: np.ones(200 * MIB, dtype=np.uint8).sum(), gpu=False)
        assert peak_of(lambda: None, gpu=False) < host_peak() + MIB
        after = peak_of(lambda: None, gpu=False)
        assert peak_of(lambda: np.ones(100 * MIB, dtype=np.uint8).sum(), gpu=False) - after > 90 * MIB

    def test_a_mark_that_cannot_be_reset_is_that_until_now(self, tmp_path, monkeypatch):
        monkeypatch.setattr(peak_memory, "_RESET", tmp_path / "nowhere" / "clear_refs")
        before = host_peak()
        assert peak_of(lambda: None, gpu=False) >= before > 0

    def test_a_system_that_does_not_tell_gives_nothing(self, tmp_path, monkeypatch):
        for name in ("_STATUS", "_RESET", "_AVAILABLE", "_GROUP"):
            monkeypatch.setattr(peak_memory, name, tmp_path / "nowhere" / name)
        assert peak_of(lambda: None, gpu=False) == 0
        assert capacity(gpu=False) is None


class TestCapacity:
    @pytest.fixture
    def system(self, tmp_path, monkeypatch):
        """A system with files of our own: 1000 kB resident, 8000 kB free."""
        for name, content in {
            "_STATUS": "VmHWM:\t    1500 kB\nVmRSS:\t    1000 kB\n",
            "_AVAILABLE": "MemTotal: 9999 kB\nMemAvailable:    8000 kB\n",
        }.items():
            (tmp_path / name).write_text(content)
            monkeypatch.setattr(peak_memory, name, tmp_path / name)
        monkeypatch.setattr(peak_memory, "_GROUP", tmp_path / "group")
        (tmp_path / "group" / "memory").mkdir(parents=True)
        return tmp_path / "group"

    def test_is_what_is_held_and_half_of_what_is_free(self, system):
        assert capacity(gpu=False) == (1000 + 8000 // 2) * 1024

    @pytest.mark.parametrize(
        ("files", "free"),
        [
            ({"memory.max": "3000000", "memory.current": "1000000"}, 2_000_000),
            ({"memory/memory.limit_in_bytes": "3000000", "memory/memory.usage_in_bytes": "2000000"}, 1_000_000),
            ({"memory.max": "max", "memory.current": "1000000"}, 8000 * 1024),
            ({"memory.max": "99999999999999", "memory.current": "5"}, 8000 * 1024),
            ({"memory.max": "1000", "memory.current": "2000"}, 1),
        ],
        ids=["container", "older container", "no limit", "more than there is", "nothing left"],
    )
    def test_a_container_may_have_less(self, system, files, free):
        for name, content in files.items():
            (system / name).write_text(content)
        assert capacity(gpu=False) == 1000 * 1024 + free // 2


class TestGpu:
    def test_a_pipeline_on_one_is_seen(self):
        assert on_gpu(SimpleNamespace(device=torch.device("cuda:1")))
        assert not on_gpu(SimpleNamespace(device=torch.device("cpu")))

    def test_peak_is_that_of_the_device_since_the_work_began(self, monkeypatch):
        log = []
        monkeypatch.setattr(gpu_memory, "reset_peak", lambda: log.append("reset"))
        monkeypatch.setattr(gpu_memory, "peak", lambda: log.append("peak") or 70)
        assert peak_of(lambda: log.append("work"), gpu=True) == 70
        assert log == ["reset", "work", "peak"]

    def test_capacity_is_nine_tenths_of_the_fullest_device(self, monkeypatch):
        free, reserved = {0: 500, 1: 100}, {0: 50, 1: 300}
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 1000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved[device])
        assert capacity(gpu=True) == 360
