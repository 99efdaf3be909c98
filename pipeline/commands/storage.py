"""Commands about a store as a thing: whether it still is what was written, and a copy of it for others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pipeline.commands.options import FAILED, OK, StorePath, UsageError, app, say
from pipeline.foreign import reading, require_plain

if TYPE_CHECKING:
    from pipeline.store import Findings

_SHOWN = 10


@app.command
def verify(store: StorePath, *, as_json: Annotated[bool, Parameter(name="--json", negative="")] = False) -> int:
    """Read every finished unit of a store again, and make those pending that are not as they were written.

    Checks that every chunk is there and readable, that units are what their replica wrote, and that exactly the
    failed ones lack values. Exit code 0: all is good; 1: something was found; 2: bad input.

    Example: ``stepscope verify runs/maze_demo.zarr``
    """
    from pipeline.store import verify as verify_store
    from pipeline.store.verify import advice

    with reading(store):
        require_plain(store)
        found = verify_store(store, say=say)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        _print(found)
    for sentence in advice(found, store):
        say(sentence)
    return OK if found.good else FAILED


def _print(found: Findings) -> None:
    print(f"{found.checked} of {found.units} units checked, {len(found.bad)} bad")
    for cause, count in found.causes().items():
        print(f"{count:>8}  {cause}")
    for unit in found.bad[:_SHOWN]:
        print(f"  {unit.group}[{unit.index}]: {unit.cause}, pending again")
    if len(found.bad) > _SHOWN:
        print(f"  and {len(found.bad) - _SHOWN} more; --json lists all")
    for what, parts in (
        ("written anew", found.rebuilt),
        ("damaged part of the template", found.template),
        ("damaged part of the effects", found.effects),
        ("not checked", found.unchecked),
    ):
        for part in parts:
            print(f"  {part}: {what}")
    if found.undigested:
        print(f"{found.undigested} units have no receipt in the journal: only checksums and NaN speak for them")
    if found.skipped_lines:
        print(f"{found.skipped_lines} lines of the journal are torn or corrupted, and were skipped")
    if found.leftovers:
        print(f"{found.leftovers} unfinished files of killed writers were deleted")


@app.command
def export(
    store: StorePath,
    out: Annotated[str, Parameter(help="File to write, such as NAME.zarr.zip.")],
    *,
    force: Annotated[bool, Parameter(negative="", help="Replace the file if it exists.")] = False,
    partial: Annotated[bool, Parameter(negative="", help="Also if units are pending.")] = False,
) -> int:
    """Copy a store into one zip file that opens with xarray, for publishing.

    Example: ``stepscope export runs/maze_demo.zarr maze_demo.zarr.zip``
    """
    from pipeline.store import export_store

    if "://" in out:
        raise UsageError(f"export writes a file on this machine: {out} is a URL. Copy the file there afterwards.")
    with reading(store):
        require_plain(store)
        size = export_store(store, Path(out), force=force, partial=partial)
    print(f"Wrote {out} ({size:,} bytes).")
    return OK
