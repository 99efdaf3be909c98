"""Commands that start from a store: how far it is, its effects, its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pipeline.commands.options import FAILED, OK, StorePath, UsageError, app, whole_number
from pipeline.foreign import reading, require_plain


@app.command
def status(store: StorePath, *, as_json: Annotated[bool, Parameter(name="--json", negative="")] = False) -> int:
    """Show how much of a store is done, pending and failed.

    Example: ``stepscope status runs/maze_demo.zarr``
    """
    from pipeline.status import summarise

    with reading(store):
        require_plain(store, chunks=False)
        rows = summarise(store)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print(f"{'group':>20} {'units':>7} {'done':>7} {'pending':>8} {'failed':>7}")
        for row in rows:
            print(f"{row['group']:>20} {row['units']:>7} {row['done']:>7} {row['pending']:>8} {row['failed']:>7}")
    return FAILED if any(row["failed"] for row in rows) else OK


@app.command
def effects(
    store: StorePath,
    *,
    replicates: Annotated[int, Parameter(converter=whole_number, help="Bootstrap replicates.")] = 2000,
    seed: Annotated[int, Parameter(converter=whole_number, help="Seed of the bootstrap.")] = 0,
) -> int:
    """Aggregate a store into effect maps with bootstrap intervals over prompts, written to STORE/effects.

    Example: ``stepscope effects runs/maze_demo.zarr``
    """
    from pipeline.effects import compute_effects
    from pipeline.store import open_store

    if replicates < 1 or seed < 0:
        raise UsageError(f"out of range: --replicates {replicates}, --seed {seed}. They start at 1 and 0.")
    with reading(store):
        require_plain(store)
        open_store(store)
        written = compute_effects(store, unit="prompt", replicates=replicates, seed=seed)
    print(f"Wrote {', '.join(written)} to {store}/effects.")
    return OK


@app.command
def report(
    store: StorePath,
    *,
    out: Annotated[
        Path | None, Parameter(help="Folder for report.html and its PNGs; default STORE with suffix _report.")
    ] = None,
) -> int:
    """Draw a store's effects as one HTML page that opens offline, and as PNG files.

    Example: ``stepscope report runs/maze_demo.zarr --out runs/demo_report``
    """
    from pipeline.report import write_report
    from pipeline.store import open_store

    with reading(store):
        require_plain(store)
        open_store(store)
        if not (store / "effects").exists():
            raise UsageError(f"{store} has no effects yet. Run first: stepscope effects {store}")
        page = write_report(store, out or store.with_name(store.stem + "_report"))
    print(f"Wrote {page}.")
    return OK
