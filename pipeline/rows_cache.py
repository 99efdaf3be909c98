"""What was measured of a model on this machine, kept in the user's cache folder so that it is measured once."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.hardware import machine
from pipeline.plan import Plan
from pipeline.rows import Table, as_data, from_data

FORMAT = 1
_LIBRARIES = ("torch", "diffusers", "transformers", "nnsight")


def cache_folder() -> Path:
    """Return the folder of ours in the user's cache; it may not exist."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of these folders says to ignore a path that is not absolute.
    base = given if os.path.isabs(given) else os.path.join(os.path.expanduser("~"), ".cache")
    # A user without a home keeps nothing: below this no file can be.
    return Path(base if os.path.isabs(base) else os.devnull) / "stepscope"


def about(plan: Plan, hardware: str) -> dict[str, Any]:
    """Return everything that what a forward takes depends on, as plain data."""
    geometry, model = plan.geometry, plan.config.model
    return {
        "format": FORMAT,
        "model": plan.model.digest,
        "dtype": model.dtype,
        "device_map": model.device_map,
        "tokens": [geometry.frames, geometry.height, geometry.width],
        "calls": [list(call) for call in geometry.calls],
        "arguments": dict(plan.config.sampler.arguments),
        "metrics": list(plan.config.metrics),
        "threads": plan.config.engine.threads,
        "hardware": f"{hardware}, {machine()}",
        "libraries": {name: version(name) for name in _LIBRARIES},
    }


class RowsCache:
    """The table of one model on one kind of machine; whatever is wrong with its file, it is as if there were none.

    Parameters
    ----------
    known : what the table depends on, see ``about``. folder : for tests.
    """

    def __init__(self, known: dict[str, Any], folder: Path | None = None) -> None:
        text = json.dumps(known, sort_keys=True)
        self._known: dict[str, Any] = json.loads(text)
        name = hashlib.sha256(text.encode()).hexdigest()
        self.file = (folder or cache_folder()) / "rows" / f"{name[:32]}.json"

    def read(self) -> Table | None:
        """Return the table, None if there is none or it is damaged."""
        try:
            data = json.loads(self.file.read_text(encoding="utf-8"))
            return from_data(data["table"]) if data["about"] == self._known else None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def write(self, table: Table) -> None:
        """Keep a table, whole or not at all; a folder that cannot be written keeps none."""
        unfinished = self.file.with_name(f"{self.file.name}.{uuid.uuid4().hex}.partial")
        content = json.dumps({"about": self._known, "table": as_data(table)}, indent=1)
        with suppress(OSError):
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                unfinished.write_text(content, encoding="utf-8")
                os.replace(unfinished, self.file)
            finally:
                unfinished.unlink(missing_ok=True)
