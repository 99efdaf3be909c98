"""Restoring the template: what creation wrote is a function of the plan, so damage to it costs nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import zarr

from pipeline.plan import Plan
from pipeline.store.contents import consolidated, metadata_of
from pipeline.store.location import Location
from pipeline.store.template import consolidate, template_of

ROOT = "zarr.json"
_READERS = 8


def restore_template(location: Location, plan: Plan) -> list[str]:
    """Write anew what of a plan's template is missing, unreadable or different in a store; return those keys.

    Groups, arrays, coordinates, samples and floors are the template; the root, what units write, status, selections
    and effects are not. Values are compared, not bytes: another version of the codec may pack them otherwise.
    """
    template = template_of(plan)
    names = [key for key in template if key != ROOT and key.endswith(f"/{ROOT}")]
    with ThreadPoolExecutor(_READERS) as pool:
        stored = dict(zip(names, pool.map(location.read, names), strict=True))
        restored = [key for key in names if metadata_of(stored[key]) != metadata_of(template[key])]
        for key in restored:
            location.write(key, template[key])
        chunks = [key for key in template if not key.endswith(ROOT) and _array_of(key).rpartition("/")[2] != "status"]
        stored = dict(zip(chunks, pool.map(location.read, chunks), strict=True))
    for key in chunks:
        if stored[key] == template[key]:
            continue
        # One that is not there reads as fill values, and may seem right.
        if stored[key] is None or not _same_values(location, template, _array_of(key)):
            location.write(key, template[key])
            restored.append(key)
    repeated = consolidated(location)
    if restored or any(repeated.get(key.removesuffix(f"/{ROOT}")) != metadata_of(template[key]) for key in names):
        consolidate(location)
        if not restored:
            restored.append(f"{ROOT} (consolidated metadata)")
    return sorted(restored)


def _array_of(key: str) -> str:
    """Return the path of the array that a chunk belongs to; the only chunk of one without axes is ``c``."""
    return key.removesuffix("/c") if key.endswith("/c") else key.rpartition("/c/")[0]


def _same_values(location: Location, template: dict[str, bytes], path: str) -> bool:
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    buffer: Any = default_buffer_prototype().buffer
    wanted = zarr.open_array(
        MemoryStore({k: buffer.from_bytes(v) for k, v in template.items()}), path=path, mode="r", zarr_format=3
    )
    try:
        found = zarr.open_array(location.zarr(read_only=True), path=path, mode="r", zarr_format=3)
        a, b = np.asarray(found[...]), np.asarray(wanted[...])
        return bool(np.array_equal(a, b, equal_nan=b.dtype.kind == "f"))
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):
        return False
