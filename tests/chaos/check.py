"""What is true of a store, told by comparison with the store of an undisturbed run, and by no code under test."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from pipeline.layout import BASELINE, Layout, Unit
from pipeline.plan import Plan

DONE, FAILED = 1, 2
_CHANGING = ("status", "exact", "drawn")
_OF_ONE_RUN = ("created", "hardware", "libraries")


def believed_done(store: Path, layout: Layout) -> set[tuple[str, int]]:
    """Return the units that status or journal call done; both are read without the code under test."""
    groups = {unit.group for unit in layout}
    root = zarr.open_group(str(store), mode="r", use_consolidated=False)
    found: set[tuple[str, int]] = set()
    for group in groups:
        values = _read(root, f"{group}/status")
        found |= {(group, index) for index in np.flatnonzero(values == DONE).tolist()} if values is not None else set()
    journal = store / "journal.jsonl"
    for line in journal.read_bytes().splitlines() if journal.exists() else ():
        try:
            entry = json.loads(_unsealed(line))
            unit = (entry["group"], entry["index"])
        except (ValueError, LookupError, TypeError):
            continue
        if entry.get("unset") or entry.get("error") or entry.get("failed"):
            found.discard(unit)
        elif unit[0] in groups:
            found.add(unit)
    return found


def _unsealed(line: bytes) -> bytes:
    """Return a line without its checksum, and nothing of one whose checksum says that it changed."""
    text, mark, rest = line.rstrip().rpartition(b', "crc": "')
    if not mark or len(rest) != len(b'00000000"}'):
        return line
    return text + b"}" if rest[:8] == f"{zlib.crc32(text + b'}'):08x}".encode() else b""


def differing_units(store: Path, reference: Path, plan: Plan) -> set[tuple[str, int]]:
    """Return the units whose values are not those of the undisturbed run, or cannot be read."""
    mine, theirs = (zarr.open_group(str(path), mode="r", use_consolidated=False) for path in (store, reference))
    whole: dict[str, tuple[Any, Any]] = {}
    found = set()
    for unit in plan.layout:
        for path, region in regions(plan, unit):
            if path not in whole:
                whole[path] = (_open(mine, path), np.asarray(theirs[path][...]))
            array, expected = whole[path]
            if array is None or not _same_region(array, expected, region):
                found.add((unit.group, unit.index))
    return found


def regions(plan: Plan, unit: Unit) -> Iterator[tuple[str, Any]]:
    """Yield the path of every array that a unit writes, and its region there."""
    metrics = [metric.name for metric in plan.metrics]
    if unit.group != BASELINE:
        where = (unit.sample, slice(unit.start, unit.stop)) if plan.by_name[unit.group].shape else (unit.sample,)
        yield from ((f"{unit.group}/{name}", where) for name in metrics)
        return
    yield from ((f"{BASELINE}/{name}{suffix}", (unit.sample,)) for name in metrics for suffix in ("", "_by_step"))
    yield from ((f"{grid.experiment.name}/estimate", (unit.sample,)) for grid in plan.screened)
    if unit.sample in plan.config.previews.samples:
        yield "previews/x0_hat", (plan.config.previews.samples.index(unit.sample),)


def strays(store: Path, reference: Path, plan: Plan) -> list[str]:
    """Return the arrays of no unit that differ from the undisturbed run; a selection may still be open."""
    mine, theirs = (zarr.open_group(str(path), mode="r", use_consolidated=False) for path in (store, reference))
    of_units = {path for unit in plan.layout for path, _ in regions(plan, unit)}
    found = []
    for path in _arrays(reference):
        if path not in of_units and path.rpartition("/")[2] not in _CHANGING:
            values = _read(mine, path)
            if values is None or not _same(values, np.asarray(theirs[path][...])):
                found.append(path)
    for grid in plan.screened:
        found += _stray_selection(mine, theirs, grid.experiment.name)
    return found


def _arrays(store: Path) -> list[str]:
    """Return the paths of all arrays of a sound store."""
    files = [path for path in store.rglob("zarr.json") if json.loads(path.read_bytes())["node_type"] == "array"]
    return sorted(str(path.parent.relative_to(store)) for path in files)


def judge(store: Path, reference: Path, plan: Plan) -> dict[str, list[Any]]:
    """Return what damage a store holds by now: done units with wrong values, and arrays of no unit that differ."""
    done = believed_done(store, plan.layout)
    wrong = differing_units(store, reference, plan) & done
    return {"units": sorted(map(list, wrong)), "strays": strays(store, reference, plan), "done": [len(done)]}


def verdict(store: Path, reference: Path, plan: Plan) -> dict[str, list[Any]]:
    """Return what a finished store lacks: units that are not done, and units, arrays or metadata that are wrong."""
    root = zarr.open_group(str(store), mode="r", use_consolidated=False)
    lost = []
    for group in {unit.group: None for unit in plan.layout}:
        values = _read(root, f"{group}/status")
        missing = range(plan.group_units(group)) if values is None else np.flatnonzero(values != DONE).tolist()
        lost += [[group, index] for index in missing]
    wrong: list[Any] = sorted(map(list, differing_units(store, reference, plan)))
    wrong += strays(store, reference, plan) + _differing_metadata(store, reference)
    wrong += [f"{g.experiment.name}/exact is open" for g in plan.screened if _is_open(root, g.experiment.name)]
    wrong += [str(path.relative_to(store)) for path in store.rglob("*.partial")]
    return {"lost": lost, "wrong": wrong}


def _differing_metadata(store: Path, reference: Path) -> list[str]:
    """Compare every group's and array's metadata and attributes, consolidated ones included."""
    keys = {path.relative_to(reference) for path in reference.rglob("zarr.json")}
    keys |= {path.relative_to(store) for path in store.rglob("zarr.json")}
    return [str(key) for key in sorted(keys) if _metadata(store / key) != _metadata(reference / key)]


def _metadata(path: Path) -> Any:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    for name in _OF_ONE_RUN:
        found.get("attributes", {}).pop(name, None)
    return found


def _stray_selection(mine: Any, theirs: Any, group: str) -> list[str]:
    if _is_open(mine, group):
        return []
    paths = [f"{group}/{name}" for name in ("exact", "drawn")]
    pairs = [(path, _read(mine, path), np.asarray(theirs[path][...])) for path in paths]
    return [path for path, found, expected in pairs if found is None or not _same(found, expected)]


def _is_open(root: Any, group: str) -> bool:
    values = _read(root, f"{group}/exact")
    return values is not None and bool((values == 255).all())


def _open(root: Any, path: str) -> Any:
    try:
        return root[path]
    except Exception:
        return None


def _read(root: Any, path: str) -> Any:
    """Return the values of an array, None if they cannot be read, whatever the reason is."""
    try:
        return np.asarray(root[path][...])
    except Exception:
        return None


def _same_region(array: Any, expected: Any, region: Any) -> bool:
    try:
        return _same(np.asarray(array[region]), expected[region])
    except Exception:
        return False


def _same(a: Any, b: Any) -> bool:
    """Whether two arrays are the same bit for bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.tobytes() == b.tobytes() if a.dtype.kind == "f" else bool((a == b).all())
