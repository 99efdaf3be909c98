"""A worker that fails as a table says, in a module of its own that the processes of replicas import quickly."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class UnpicklableError(Exception):
    """Cannot be rebuilt from its arguments, as many library exceptions cannot."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")


@dataclass
class FaultyWorker:
    """Fails in the attempts that a table names by unit and attempt; attempts are counted in files, across processes."""

    folder: Path
    faults: dict[tuple[int, int], str]
    hardware: str = "a box"
    turn: int = 0

    def run(self, payload: int) -> dict[str, Any]:
        self.turn += 1
        match self.faults.get((payload, count(self.folder / f"unit-{payload}"))):
            case "raise":
                raise ValueError(f"unit {payload} is broken")
            case "raise unpicklable":
                raise UnpicklableError(7, "no space")
            case "return unpicklable":
                return {"lock": sys.stdout}
            case "die":
                # Dies as the known runner, not while the driver still waits for the unit before.
                wait_for(self.folder / f"started-{payload}")
                os._exit(1)
            case "die at once":
                os._exit(1)
            case "hang":
                wait_for(self.folder / "never", seconds=1e9)
            case "wait":
                wait_for(self.folder / "go")
        return {"payload": payload, "process": os.getpid(), "turn": self.turn, **where()}


@dataclass
class FaultyFactory:
    """Builds the worker, or fails in the starts that a table names."""

    folder: Path
    faults: dict[tuple[int, int], str]
    start_faults: dict[int, str]

    def __call__(self) -> FaultyWorker:
        match self.start_faults.get(count(self.folder / "starts")):
            case "raise":
                raise OSError("no weights")
            case "die":
                os._exit(1)
        return FaultyWorker(self.folder, self.faults)


def count(path: Path) -> int:
    """Add one to the number that a file keeps as its length, and return it."""
    with path.open("ab") as file:
        file.write(b".")
        return file.tell()


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear")
        time.sleep(0.01)


def where() -> dict[str, str]:
    """Return the node of this process and the GPUs that it sees."""
    import ray

    return {
        "node": ray.get_runtime_context().get_node_id(),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }
