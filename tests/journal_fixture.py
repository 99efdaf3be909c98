"""Stores without a model and journals without a sweep, for tests of what is read off them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from pipeline.screening import OPEN
from pipeline.store import SCHEMA_VERSION

START = 1_800_000_000.0
CREATED = "2027-01-15T08:00:00Z"
"""The same moment as START."""


def write_store(
    path: Path,
    groups: Mapping[str, tuple[int, ...]],
    *,
    samples: int = 2,
    width: int = 2,
    screened: Mapping[str, dict[str, Any]] | None = None,
) -> Path:
    """Write an empty store: a baseline, and groups of cells with these axes and ``width`` positions a unit."""
    attributes = {
        "schema_version": SCHEMA_VERSION,
        "config_sha256": "ab" * 32,
        "config_json": json.dumps({"name": "made up", "metrics": ["score"]}),
        "created": CREATED,
    }
    root = zarr.create_group(str(path), zarr_format=3, attributes=attributes)
    _group(root, "baseline", (samples, 2), (1, 2), samples)
    for name, shape in groups.items():
        windows = -(-shape[0] // width) if shape else 1
        chunks = (1, width, *shape[1:]) if shape else (1,)
        group = _group(root, name, (samples, *shape), chunks, samples * windows)
        if screened and name in screened:
            group.attrs["screen"] = json.dumps({**screened[name], "ranking": "by size", "formula": "f"})
            group.create_array("exact", shape=shape, dtype="uint8", chunks=shape, fill_value=OPEN)
    return path


def _group(root: Any, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], units: int) -> Any:
    group = root.create_group(name)
    group.create_array("score", shape=shape, dtype="float32", chunks=chunks, fill_value=float("nan"))
    status = group.create_array("status", shape=(units,), dtype="uint8", chunks=(units,))
    status[:] = np.zeros(units, dtype=np.uint8)
    return group


def set_status(path: Path, group: str, values: list[int]) -> None:
    """Write a group's status, as the driver does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array: Any = zarr.open_group(str(path), mode="r+")[f"{group}/status"]
    array[:] = np.array(values, dtype=np.uint8)


def done(group: str, index: int, time: float = 0.0, **changes: Any) -> dict[str, Any]:
    """Return the entry of a finished unit, ``time`` seconds after the start."""
    entry = {
        "time": START + time, "unit": index, "group": group, "index": index, "replica": 0, "attempt": 1, "cells": 4,
        "failed": 0, "bytes": 100, "row_forwards": 10, "seconds": 1.0, "gpu_bytes": 0,
    }  # fmt: skip
    return {**entry, **changes}


def failed(group: str, index: int, error: str, time: float = 0.0) -> dict[str, Any]:
    """Return the entry of a unit that was given up."""
    about = {"unit": index, "group": group, "index": index, "attempts": 3}
    return {"time": START + time, **about, "error": error, "failed": 4}


def retried(unit: int | None, error: str, time: float = 0.0, replica: int = 0) -> dict[str, Any]:
    """Return the entry of an attempt that is repeated, or of a replica that was lost."""
    return {"time": START + time, "unit": unit, "replica": replica, "retried": error}


def unset(group: str, index: int, reason: str = "checksum", time: float = 0.0) -> dict[str, Any]:
    """Return the entry of a unit that was found bad after it was done."""
    return {"time": START + time, "group": group, "index": index, "unset": reason}


def append(path: Path, *entries: Mapping[str, Any], name: str = "journal.jsonl") -> None:
    """Append entries to a journal."""
    file = path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as handle:
        handle.writelines(json.dumps(entry) + "\n" for entry in entries)
