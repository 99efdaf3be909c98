"""Peak memory of a piece of work in this process, and how much it could have: a GPU's, or else the host's."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline import gpu_memory

SHARE = 0.5
"""Share of the host's free memory that one replica takes at most: others run beside it."""
GPU_SHARE = 0.9
"""The same of a GPU's, whose allocator wastes some."""
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_AVAILABLE = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
_GROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def on_gpu(pipe: Any) -> bool:
    """Whether a pipeline computes on a GPU."""
    return bool(pipe.device.type == "cuda")


def peak_of(work: Callable[[], Any], *, gpu: bool) -> int:
    """Run once and return the most bytes that this process held meanwhile, its weights included; 0 if unknown.

    Where the host's high-water mark cannot be reset, it is that of the process until now.
    """
    if gpu:
        gpu_memory.reset_peak()
        work()
        return gpu_memory.peak()
    with suppress(OSError):
        _RESET.write_text("5", encoding="ascii")
    work()
    return host_peak()


def host_peak() -> int:
    """Return the high-water mark of this process's resident memory in bytes, 0 where the system does not tell."""
    return _field(_STATUS, "VmHWM")


def capacity(*, gpu: bool) -> int | None:
    """Return the bytes that this process could hold: what it holds and a share of what is free; None if unknown."""
    if gpu:
        return _gpu_capacity()
    free = _field(_AVAILABLE, "MemAvailable")
    bounds = [bound for bound in (free, _free_of_group()) if bound]
    return _field(_STATUS, "VmRSS") + int(SHARE * min(bounds)) if bounds else None


def _gpu_capacity() -> int:
    import torch

    devices = range(torch.cuda.device_count())
    free = [torch.cuda.mem_get_info(d)[0] + torch.cuda.memory_reserved(d) for d in devices]
    return int(GPU_SHARE * min(free))


def _free_of_group() -> int | None:
    """Return what the control group of a container leaves; None without a limit."""
    for most, used in _GROUP_FILES:
        with suppress(OSError, ValueError):
            return max(1, int((_GROUP / most).read_text()) - int((_GROUP / used).read_text()))
    return None


def _field(file: Path, name: str) -> int:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found is not None else 0
