"""What starting a local Ray took here the last time: kept in the user's cache folder, for the plan."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from pipeline.rows_cache import cache_folder

UNKNOWN_S = 8.0
"""Where Ray was never started here: starts took 7 to 17 seconds on machines of two cores."""
_MOST_S = 600.0


def remember_start(seconds: float, folder: Path | None = None) -> None:
    """Keep what the start of Ray took; a folder that cannot be written keeps nothing."""
    file = _file(folder)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.partial")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps({"seconds": round(seconds, 2)}), encoding="utf-8")
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
