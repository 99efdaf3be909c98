"""The processes that a benchmark has started: what each kind of them takes, and that none is left behind."""

from __future__ import annotations

import ctypes
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import psutil

MIB = 2**20
_CHILD_SUBREAPER = 36
_KINDS = {
    "gcs_server": "gcs",
    "raylet/raylet": "raylet",
    "dashboard/agent.py": "dashboard agent",
    "ray::DashboardAgent": "dashboard agent",
    "runtime_env/agent": "runtime env agent",
    "ray::RuntimeEnvAgent": "runtime env agent",
    "autoscaler": "autoscaler",
    "log_monitor": "log monitor",
    "dashboard": "dashboard",
    "default_worker": "worker",
    "ray::": "worker",
    "benchmarks": "driver",
}
"""Part of a command, and what it is; the first that fits counts."""


def kind_of(command: str) -> str:
    """Return what a process of Ray, or of a benchmark, is by its command line."""
    return next((kind for part, kind in _KINDS.items() if part in command), "other")


def adopt_orphans() -> None:
    """Become the parent of whatever descends from this process and loses its own, so that ``started`` finds it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_CHILD_SUBREAPER, 1, 0, 0, 0)


def started() -> list[psutil.Process]:
    """Return every living process that descends from this one."""
    return psutil.Process().children(recursive=True)


def this() -> psutil.Process:
    """Return this process."""
    return psutil.Process()


def take_away(processes: Iterable[psutil.Process], patience_s: float = 30.0) -> list[int]:
    """Wait until processes are gone and kill those that are not; return the numbers of the killed.

    Raises
    ------
    RuntimeError : some are alive nonetheless.
    """
    late = _outliving(list(processes), patience_s)
    for process in late:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    left = _outliving(late, patience_s)
    if left:
        raise RuntimeError(f"processes of this benchmark are left: {[process.pid for process in left]}. Kill them.")
    return [process.pid for process in late]


def _outliving(processes: list[psutil.Process], patience_s: float) -> list[psutil.Process]:
    deadline = time.monotonic() + patience_s
    while (alive := [process for process in processes if _lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def memory(processes: Iterable[psutil.Process]) -> dict[str, dict[str, Any]]:
    """Return for each kind how many there are and the mean memory that each shares with no other, in MiB."""
    found: dict[str, list[int]] = defaultdict(list)
    for process in processes:
        try:
            found[kind_of(" ".join(process.cmdline()))].append(process.memory_full_info().uss)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return {
        kind: {"processes": len(sizes), "mib_each": round(sum(sizes) / len(sizes) / MIB)}
        for kind, sizes in sorted(found.items())
    }


class Stopwatch:
    """Processor time of some processes since this was made."""

    def __init__(self, processes: Iterable[psutil.Process]) -> None:
        self._before = {process: _seconds(process) for process in processes}
        self._began = time.perf_counter()

    def cores(self) -> dict[str, float]:
        """Return the cores that each kind kept busy, all processes of it together."""
        wall = time.perf_counter() - self._began
        total: dict[str, float] = defaultdict(float)
        for process, before in self._before.items():
            try:
                kind = kind_of(" ".join(process.cmdline()))
                total[kind] += _seconds(process) - before
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return {kind: round(seconds / wall, 4) for kind, seconds in sorted(total.items())}


def _seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)
