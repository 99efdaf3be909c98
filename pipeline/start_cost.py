"""What starting a local Ray took here the last time: kept in the user's cache folder, for the plan."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.rows_cache import cache_folder

UNKNOWN_S = 8.0
"""Where Ray was never started here: starts took 7 to 17 seconds on machines of two cores."""
_MOST_S = 600.0


@contextmanager
def timed_start(folder: Path | None = None) -> Iterator[None]:
    """Remember how long the start of Ray takes that runs inside."""
    began = time.perf_counter()
    yield
    file = _file(folder)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.partial")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps({"seconds": round(time.perf_counter() - began, 2)}), encoding="utf-8")
        os.replace(unfinished, file)


def start_seconds(folder: Path | None = None) -> float:
    """Return what the last start took, or what starts usually take."""
    try:
        seconds = float(json.loads(_file(folder).read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return UNKNOWN_S
    return seconds if 0 <= seconds <= _MOST_S else UNKNOWN_S


def _file(folder: Path | None) -> Path:
    return (folder or cache_folder()) / "ray_start.json"
