"""Requests to a store: ``python -m benchmarks.store_requests``.

Two parts, each into a bucket of a local S3 server that counts its requests, and into a folder whose file operations are
counted. *Units*: a real sweep of the embedded model, with one metric and with two; counted is what a unit asks for, the
first one of a group apart, as a replica looks the group's arrays up then. *Driver*: a sweep of units that write
nothing, many a second, so that all that the driver does every few seconds is due; counted is what it asks for in a
second. Bytes are those sent to the bucket, compressed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import counted
from benchmarks.counted import DRIVER, REPLICA, Tally
from benchmarks.figures import Bench
from benchmarks.million_units import NoWork
from cluster import InlinePool, UnitDone
from pipeline.config import SweepConfig
from pipeline.layout import BASELINE, Unit
from pipeline.ledger import FLUSH_SECONDS
from pipeline.plan import Plan, make_plan
from pipeline.replica import Receipt
from pipeline.stopping import ASK_SECONDS
from pipeline.store import Journal, Place, locate
from pipeline.store.journal import SEGMENT_BYTES
from pipeline.store.lease import BEAT_SECONDS
from pipeline.sweep import run_sweep

METRICS = ("goal_evidence", "latent_distance")
PLACES = ("bucket", "folder")
EXPERIMENTS = {
    "map": {"kind": "patch", "step": "all", "layer": "all", "component": ["attn1"]},
    "skip": {"kind": "step_skip", "mode": ["freeze", "drop"], "step": "all"},
    "screened": {
        "kind": "patch",
        "step": "all",
        "layer": "all",
        "component": ["attn2"],
        "screen": {"top": 0.2, "metric": "clean_projection"},
    },
}


def config(metrics: tuple[str, ...], mazes: int, experiments: tuple[str, ...] = tuple(EXPERIMENTS)) -> SweepConfig:
    """Return a small sweep of the embedded model."""
    return SweepConfig.model_validate(
        {
            "name": "requests",
            "model": {"id": "embedded:maze"},
            "task": {"name": "maze", "mazes": mazes, "pairs": ["red/blue"]},
            "sampler": {"steps": 5},
            "metrics": list(metrics),
            "experiments": {name: EXPERIMENTS[name] for name in experiments},
            "previews": {"samples": []},
            "unit_cells": 6,
        }
    )


class Watched:
    """A worker of which it is noted what it asks for with every unit."""

    def __init__(self, worker: Any, tally: Tally, notes: Notes) -> None:
        self._worker, self._tally, self._notes = worker, tally, notes

    def run(self, unit: Unit) -> Any:
        """Run a unit."""
        before, sent = Counter(self._tally.of(REPLICA)), self._tally.sent[REPLICA]
        with self._tally.replica():
            receipt = self._worker.run(unit)
        asked = Counter(self._tally.of(REPLICA)) - before
        self._notes.add(unit, asked, self._tally.sent[REPLICA] - sent, receipt.bytes)
        return receipt


class Notes:
    """What units asked for, the first one of each group apart from the others."""

    def __init__(self, screened: set[str]) -> None:
        self._screened = screened
        self._seen: set[str] = set()
        self._units: Counter[str] = Counter()
        self._asked: dict[str, Counter[str]] = defaultdict(Counter)
        self._sent: Counter[str] = Counter()
        self._values: Counter[str] = Counter()

    def add(self, unit: Unit, asked: Counter[str], sent: int, value_bytes: int) -> None:
        """Note one unit."""
        kind = "baseline" if unit.group == BASELINE else "screened" if unit.group in self._screened else "cells"
        kind = kind if unit.group in self._seen else f"first_{kind}"
        self._seen.add(unit.group)
        self._units[kind] += 1
        self._asked[kind].update(asked)
        self._sent[kind] += sent
        self._values[kind] += value_bytes

    def figures(self) -> dict[str, Any]:
        """Return the means over the units of each kind."""
        return {
            kind: {
                "units": n,
                "requests": {what: round(count / n, 2) for what, count in sorted(self._asked[kind].items())},
                "bytes_sent": round(self._sent[kind] / n),
                "bytes_of_values": round(self._values[kind] / n),
            }
            for kind, n in sorted(self._units.items())
        }


def units(plan: Plan, place: Place, tally: Tally) -> dict[str, Any]:
    """Run a plan with a real replica, and return what it asked for."""
    from pipeline.replica import Replica

    notes = Notes({grid.experiment.name for grid in plan.screened})
    start: dict[str, int] = {}

    def make() -> Watched:
        with tally.replica():
            replica = Replica(plan.config.model_dump(mode="json"), locate(place).address)
        start.update(tally.of(REPLICA))
        return Watched(replica, tally, notes)

    result = run_sweep(plan, place, make_executor=lambda plan, place: InlinePool(make))
    assert (result.done, result.failed) == (len(plan.layout), 0), result
    return {
        "metrics": len(plan.metrics),
        "replica_start": start,
        "unit": notes.figures(),
        "journal_bytes_a_unit": round(_journal_bytes(place) / len(list(Journal(place).entries()))),
    }


class Idle(NoWork):
    """A worker whose units take some time and write nothing; their receipts are as long as those of real ones."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def run(self, payload: Any) -> Receipt:
        """Wait, and return a receipt."""
        time.sleep(self._seconds)
        return Receipt(cells=6, failed=0, bytes=48, row_forwards=60, seconds=self._seconds, digest="0" * 64)


def driver(plan: Plan, place: Place, tally: Tally, unit_s: float) -> dict[str, Any]:
    """Drive a plan whose units write nothing, and return what the driver asked for in a second."""
    marks: list[tuple[float, Counter[str], int]] = []
    created: dict[str, int] = {}

    def observe(event: Any, unit: Any) -> None:
        if isinstance(event, UnitDone):
            # The first unit and the last one.
            marks[1:] = [(time.perf_counter(), Counter(tally.of(DRIVER)), tally.sent[DRIVER])]

    result = run_sweep(
        plan,
        place,
        make_executor=lambda plan, place: InlinePool(lambda: Idle(unit_s)),
        observe=observe,
        on_start=lambda *_: created.update(tally.of(DRIVER)),
    )
    assert result.done == len(plan.layout), result
    (began, before, sent), (ended, after, sent_after) = marks[0], marks[-1]
    seconds = ended - began
    return {
        "groups": 1 + len(plan.by_name),
        "units_a_second": round(result.done / seconds, 1),
        "seconds": round(seconds, 1),
        "create_and_open": created,
        "requests_a_second": {kind: round(n / seconds, 2) for kind, n in sorted((after - before).items())},
        "bytes_sent_a_second": round((sent_after - sent) / seconds),
    }


def _journal_bytes(place: Place) -> int:
    location = locate(place)
    return sum(len(location.read(key) or b"") for key in location.list() if key.startswith("journal"))


@contextmanager
def counted_place(kind: str, tally: Tally) -> Iterator[str]:
    """Give a place for a store in a new bucket or folder that counts."""
    if kind == "bucket":
        with counted.bucket(tally) as url:
            yield f"{url}/run.zarr"
    else:
        with tempfile.TemporaryDirectory() as folder, counted.folder(Path(folder), tally) as path:
            yield f"{path}/run.zarr"


def measure(mazes: int, seconds: float, unit_s: float) -> dict[str, Any]:
    """Count both parts in both kinds of place."""
    return {
        **{kind: _measure(kind, mazes, seconds, unit_s) for kind in PLACES},
        "constants": {
            "status_and_journal_every_s": FLUSH_SECONDS,
            "heartbeat_every_s": BEAT_SECONDS,
            "stop_asked_every_s": ASK_SECONDS,
            "journal_segment_bytes": SEGMENT_BYTES,
        },
    }


def _measure(kind: str, mazes: int, seconds: float, unit_s: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for metrics in (METRICS[:1], METRICS):
        tally = Tally()
        with counted_place(kind, tally) as place:
            found[f"units_of_{len(metrics)}"] = units(make_plan(config(metrics, mazes)), place, tally)
    tally, plain = Tally(), ("map", "skip")
    a_maze = len(make_plan(config(METRICS, 1, plain)).layout)
    plan = make_plan(config(METRICS, max(1, round(seconds / unit_s / a_maze)), plain))
    with counted_place(kind, tally) as place:
        found["driver"] = driver(plan, place, tally, unit_s)
    return found


def main() -> int:
    """Count and print."""
    bench = Bench(__doc__)
    bench.parser.add_argument("--mazes", type=int, default=2)
    bench.parser.add_argument("--seconds", type=float, default=20.0, help="how long the driver is watched, about")
    bench.parser.add_argument("--unit-s", type=float, default=0.05, help="length of a unit meanwhile")
    args = bench.parser.parse_args()
    return bench.conclude(args, measure(args.mazes, args.seconds, args.unit_s))


if __name__ == "__main__":
    sys.exit(main())
