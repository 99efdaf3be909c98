"""Write the example and the table of metrics in ``docs/watching.md``: ``python -m docs.make_watching``.

The example is the dashboard of a made-up store with a made-up journal, drawn by the functions that draw a real one.
"""

from __future__ import annotations

import io
import random
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.dashboard import draw
from pipeline.status import Watch
from pipeline.telemetry import Telemetry
from tests.journal_fixture import START, append, done, failed, retried, write_store

PAGE = Path(__file__).with_name("watching.md")
WIDTH = 100
_SECONDS = {"baseline": 40.0, "patch_map": 200.0, "knockout": 70.0}
_CELLS = {"baseline": 2, "patch_map": 1200, "knockout": 400}
_NOW = START + 3000
_REPLICAS, _SAMPLES = 6, 24


def example() -> str:
    """Return the dashboard of the made-up sweep."""
    with tempfile.TemporaryDirectory() as folder:
        shapes = {"patch_map": (50, 40, 3), "knockout": (50, 40), "step_skip": (50, 3)}
        store = write_store(Path(folder, "wan_maze.zarr"), shapes, samples=_SAMPLES, width=10)
        _write_journal(store)
        shown = Watch(store, lambda: _NOW).look()
    page = io.StringIO()
    console = Console(file=page, width=WIDTH, height=60, color_system=None, force_terminal=False)
    console.print(draw(shown, console.height))
    lines = (line.rstrip().removeprefix(" ") for line in page.getvalue().splitlines())
    return "\n".join(lines).replace(str(store), "runs/wan_maze.zarr")


def _write_journal(store: Path) -> None:
    chance = random.Random(7)
    units = [("baseline", n) for n in range(_SAMPLES)]
    units += [(group, n) for n in range(5 * _SAMPLES) for group in ("patch_map", "knockout")]
    free, entries = [float(n) for n in range(_REPLICAS)], []
    for group, index in units:
        replica = min(range(_REPLICAS), key=lambda n: free[n])
        seconds = _SECONDS[group] * chance.uniform(0.9, 1.1)
        free[replica] += seconds
        entries += _entries(group, index, free[replica], replica, seconds, chance)
    entries.sort(key=lambda entry: entry["time"])
    append(store, *(entry for entry in entries if entry["time"] <= _NOW))


def _entries(
    group: str, index: int, at: float, replica: int, seconds: float, chance: random.Random
) -> list[dict[str, Any]]:
    cells = _CELLS[group]
    end = done(group, index, at, replica=replica, seconds=seconds, cells=cells, bytes=cells * 8)
    end |= {"row_forwards": cells * 50, "gpu_bytes": int(chance.uniform(6.1e10, 6.4e10))}
    match chance.randrange(24):
        case 0:
            error = f"OutOfMemoryError: CUDA out of memory. Tried to allocate {chance.uniform(1, 4):.2f} GiB"
            return [retried(index, error, at - seconds / 2, replica), end]
        case 1:
            return [{**end, "failed": 3}]
        case 2 if group == "knockout":
            return [failed(group, index, f"ValueError: head {index % 40} is not in /models/wan/{index}", at)]
    return [end]


def table() -> str:
    """Return the metrics as a table."""
    rows = [f"| `{name}` | {kind} | {labels} | {about} |" for name, kind, labels, about in Telemetry().rows]
    return "\n".join(["| metric | kind | labels | meaning |", "|---|---|---|---|", *rows])


def render(text: str) -> str:
    """Return the page with the parts between its marks written anew."""
    for name, part in (("example", f"```text\n{example()}\n```"), ("metrics", table())):
        begin, end = f"<!-- {name}: begin, written by `make watching-page` -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{part}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
