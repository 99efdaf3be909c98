"""Peak GPU memory of a unit, with a CUDA that is made up as tests have none."""

from __future__ import annotations

import pytest
import torch

from pipeline import gpu_memory


class Cuda:
    """Devices with what was allocated at most since the last reset."""

    def __init__(self, *peaks, initialised=True):
        self.peaks, self.initialised = list(peaks), initialised

    def install(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: self.initialised)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(self.peaks))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peaks[device])
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        return self

    def reset(self, device):
        self.peaks[device] = 0


@pytest.mark.parametrize(
    ("peaks", "largest"), [((70,), 70), ((10, 70, 20), 70), ((), 0)], ids=["one", "several", "none"]
)
def test_peak_is_that_of_the_most_used_device(monkeypatch, peaks, largest):
    Cuda(*peaks).install(monkeypatch)
    assert gpu_memory.peak() == largest


def test_reset_begins_anew_on_every_device(monkeypatch):
    cuda = Cuda(10, 70).install(monkeypatch)
    gpu_memory.reset_peak()
    assert gpu_memory.peak() == 0
    cuda.peaks[1] = 5
    assert gpu_memory.peak() == 5


def test_cuda_that_is_not_in_use_is_not_started(monkeypatch):
    def touched(device):
        raise AssertionError("CUDA was started")

    Cuda(10, initialised=False).install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", touched)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", touched)
    gpu_memory.reset_peak()
    assert gpu_memory.peak() == 0
