"""Commands that start from a store: how far it is, its effects, its report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pipeline.commands.options import FAILED, OK, StorePath, UsageError, app, whole_number
from pipeline.foreign import reading, require_plain


@app.command
def status(
    store: StorePath,
    *,
    address: Annotated[str | None, Parameter(help="Show a job of the Ray cluster whose dashboard is here.")] = None,
    watch: Annotated[bool, Parameter(negative="", help="Show it live on a terminal until nothing is pending.")] = False,
    every: Annotated[float, Parameter(help="Seconds between two looks of --watch.")] = 2.0,
    as_json: Annotated[
        bool, Parameter(name="--json", negative="", help="Print JSON; with --watch a line at every look.")
    ] = False,
) -> int:
    """Show how much of a store is done, pending and failed, how fast it goes, and failures by cause; or a job's state.

    Works while the sweep runs in another process, and after it has died.
    Exit code 0: nothing has failed; 1: some units have.

    Example: ``stepscope status runs/maze_demo.zarr --watch``
    """
    from pipeline.commands.jobs import LOCAL, job_status, names_job

    if address is not None or names_job(str(store)):
        return job_status(str(store), address or os.environ.get("RAY_API_SERVER_ADDRESS", LOCAL), as_json=as_json)
    from pipeline.watch import show

    if not 0.1 <= every <= 86400:
        raise UsageError(f"out of range: --every {every}. Use 0.1 to 86400 seconds.")
    with reading(store):
        require_plain(store, chunks=False)
        return FAILED if show(store, live=watch, every=every, as_json=as_json).total("failed") else OK


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
        Path | None, Parameter(help="Folder for report.html and its PNGs; default NAME_report beside STORE, or here.")
    ] = None,
) -> int:
    """Draw a store's effects as one HTML page that opens offline, and as PNG files.

    Example: ``stepscope report runs/maze_demo.zarr --out runs/demo_report``
    """
    from pipeline.effects.experiment import group_names
    from pipeline.report import write_report
    from pipeline.store import open_store

    with reading(store):
        require_plain(store)
        location = open_store(store).location
        if "effects" not in group_names(location):
            raise UsageError(f"{store} has no effects yet. Run first: stepscope effects {store}")
        page = write_report(location, out or location.report_folder)
    print(f"Wrote {page}.")
    return OK
