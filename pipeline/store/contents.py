"""What lies in a store, by what it is: the arrays of each unit, the template, the effects."""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.fields import axes_of
from pipeline.plan import BASELINE
from pipeline.precision import LOOK_SAMPLES, STOPPED
from pipeline.screening import DRAWN, ESTIMATE, EXACT
from pipeline.store.errors import CorruptedError, reading
from pipeline.store.location import Location
from pipeline.store.regions import Store, chunk_key, has_axes

EFFECTS, PREVIEWS = "effects", "previews"
_LATER = ("agreement",)
"""Attributes that are added to a template when a sweep ends."""


def chunk_keys(array: Any) -> Iterator[str]:
    """Yield the key of every chunk of an array."""
    grid = [-(-size // chunk) for size, chunk in zip(array.shape, array.chunks, strict=True)]
    for position in np.ndindex(*grid):
        yield chunk_key(array, position)


def metadata_of(content: bytes | None) -> dict[str, Any] | None:
    """Return the metadata of a group or array without what changes after creation; None if it is no metadata."""
    try:
        found = json.loads(content or b"")
    except (ValueError, RecursionError):
        return None
    return essence(found) if isinstance(found, dict) and isinstance(found.get("attributes", {}), dict) else None


def essence(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata without consolidated metadata and without attributes that a sweep adds."""
    kept = {k: v for k, v in metadata.items() if k != "consolidated_metadata"}
    attributes = kept.get("attributes", {})
    kept["attributes"] = {k: v for k, v in attributes.items() if k not in _LATER}
    return kept


def consolidated(location: Location) -> dict[str, dict[str, Any]]:
    """Return the metadata of every group and array as the root repeats it, by path; empty where it does not."""
    try:
        found = json.loads(location.read("zarr.json") or b"")["consolidated_metadata"]["metadata"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    if not isinstance(found, dict) or not all(isinstance(node, dict) for node in found.values()):
        return {}
    return {path: essence(node) for path, node in found.items()}


class Contents:
    """The arrays of an open store.

    Parameters
    ----------
    nodes : metadata by path, from ``consolidated``.
    """

    def __init__(self, store: Store, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        self.store = store
        self.arrays = {path: node for path, node in nodes.items() if node.get("node_type") == "array"}

    @cached_property
    def groups(self) -> list[str]:
        """Groups with units, the baseline first."""
        found = [
            path.removesuffix("/status") for path in self.arrays if path.count("/") == 1 and _name(path) == "status"
        ]
        return sorted(found, key=lambda group: (group != BASELINE, group))

    @cached_property
    def screened(self) -> list[str]:
        """Groups whose cells have estimates."""
        return [group for group in self.groups if f"{group}/{ESTIMATE}" in self.arrays]

    @cached_property
    def in_rounds(self) -> dict[str, list[int]]:
        """Groups whose cells may stop, with the samples before each look.

        Raises
        ------
        CorruptedError : a coordinate cannot be read.
        """
        found = {}
        for group in [group for group in self.groups if f"{group}/{STOPPED}" in self.arrays]:
            with reading(self.store.location, f"{group}/{LOOK_SAMPLES}"):
                ends = np.sort(np.asarray(self.store.array(f"{group}/{LOOK_SAMPLES}")[...]))
            # Cut to size, as a store may come from anywhere.
            most = self.store.array(f"{group}/status").shape[0] // self.windows(group)[0]
            looks = self.store.array(f"{group}/{STOPPED}").shape[0]
            found[group] = [int(n) for n in np.clip(ends[:looks], 0, most)]
        return found

    def look_before(self, group: str, index: int) -> int | None:
        """Return the look that a unit of an experiment in rounds follows; None if it follows none."""
        count, _ = self.windows(group)
        round_ = bisect.bisect_right(self.in_rounds.get(group, []), index // count)
        return round_ - 1 if round_ else None

    def never_stored(self, group: str) -> NDArray[np.bool_]:
        """Return which units of a group compute and store nothing, as all of their cells have stopped.

        Raises
        ------
        CorruptedError : a look cannot be read.
        """
        units = self.store.array(f"{group}/status").shape[0]
        found = np.zeros(units, dtype=np.bool_)
        if group not in self.in_rounds:
            return found
        count, width = self.windows(group)
        ends = [*self.in_rounds[group], units // count]
        for look, (start, stop) in enumerate(itertools.pairwise(ends)):
            stopped = self.store.stopped(group, look)
            if stopped is not None:
                whole = [
                    bool(np.all(stopped[w * width : (w + 1) * width] if stopped.ndim else stopped))
                    for w in range(count)
                ]
                found[start * count : stop * count] = np.tile(whole, stop - start)
        return found

    @cached_property
    def metrics(self) -> dict[str, list[str]]:
        """Paths of the arrays that the units of each group write in their own group."""
        found: dict[str, list[str]] = {group: [] for group in self.groups}
        for path in self.arrays:
            group, _, name = path.rpartition("/")
            dims = self._dims(path)
            of_units = dims[:2] == ("sample", "run") if group == BASELINE else dims[:1] == ("sample",)
            if group in found and of_units and self._is_float(path) and name != ESTIMATE:
                found[group].append(path)
        return found

    @property
    def template(self) -> list[str]:
        """Paths of the arrays that are written at creation and never again."""
        changing = {path for paths in self.metrics.values() for path in paths} | {f"{PREVIEWS}/x0_hat"}
        changing |= {f"{group}/{name}" for group in self.groups for name in ("status", ESTIMATE, EXACT, DRAWN, STOPPED)}
        return sorted(p for p in self.arrays if p not in changing and not p.startswith(f"{EFFECTS}/"))

    @property
    def effects(self) -> list[str]:
        """Paths of the arrays of computed effects."""
        return sorted(path for path in self.arrays if path.startswith(f"{EFFECTS}/"))

    def needs(self, group: str) -> set[str]:
        """Return the groups that a group's units write to."""
        return {BASELINE, PREVIEWS, *self.screened} if group == BASELINE else {group}

    @cached_property
    def previewed(self) -> dict[int, int]:
        """Position of each sample that has a preview.

        Raises
        ------
        CorruptedError : the coordinate cannot be read.
        """
        path = f"{PREVIEWS}/preview"
        if path not in self.arrays:
            return {}
        with reading(self.store.location, path):
            values = np.asarray(self.store.array(path)[...])
        return {int(sample): position for position, sample in enumerate(values)}

    def windows(self, group: str) -> tuple[int, int]:
        """Return how many units one sample of an experiment has, and how many positions each of them takes."""
        array = self.store.array(self.metrics[group][0])
        if not has_axes(array):
            return 1, 1
        return -(-array.shape[1] // array.chunks[1]), array.chunks[1]

    def cell_axes(self, path: str) -> int:
        """Return how many leading dimensions tell the cells of one sample of an array apart; a field follows them."""
        return len(axes_of(self._dims(path))) - 1

    def values(self, group: str, index: int) -> dict[str, NDArray[Any]]:
        """Read what a unit wrote, by the paths and in the shapes of ``digest_of``.

        Raises
        ------
        CorruptedError : a chunk cannot be read. MissingError : a chunk is not there.
        """
        if group != BASELINE:
            count, _ = self.windows(group)
            sample, window = divmod(index, count)
            return {path: self._chunk(path, sample, window) for path in self.metrics[group]}
        found = {path: self._chunk(path, index) for path in self.metrics[group]}
        for screened in self.screened:
            path = f"{screened}/{ESTIMATE}"
            found[path] = self._chunk(path, index)
        if index in self.previewed:
            path = f"{PREVIEWS}/x0_hat"
            found[path] = self._chunk(path, self.previewed[index])
        return found

    def _chunk(self, path: str, sample: int, window: int | None = None) -> NDArray[Any]:
        """Read the one chunk that a unit wrote of an array, whole."""
        array = self.store.array(path)
        position = (sample, window or 0, *[0] * array.ndim)[: array.ndim]
        with reading(self.store.location, path):
            if window is None or not has_axes(array):
                values = np.asarray(array[sample])
            else:
                width = array.chunks[1]
                values = np.asarray(array[sample, window * width : (window + 1) * width])
        # A chunk that is not there reads as fill values, as one of nothing but fill values does.
        fill = array.fill_value
        empty = np.isnan(values).all() if np.isnan(fill) else (values == fill).all()
        if empty and not self.store.location.exists(chunk_key(array, position)):
            raise MissingError(f"store {self.store.location}: {chunk_key(array, position)} is missing.")
        return values

    def damage(self, path: str) -> str:
        """Return what is wrong with a whole array that is written at once: nothing, or one word."""
        try:
            array = self.store.array(path)
            if not all(self.store.location.exists(key) for key in chunk_keys(array)):
                return "missing"
            with reading(self.store.location, path):
                array[...]
        except (CorruptedError, KeyError):
            return "unreadable"
        return ""

    def _dims(self, path: str) -> tuple[str, ...]:
        return tuple(self.arrays[path].get("dimension_names") or ())

    def _is_float(self, path: str) -> bool:
        return self.arrays[path].get("data_type") == "float32"


class MissingError(CorruptedError):
    """A chunk that must be there is not."""


def _name(path: str) -> str:
    return path.rpartition("/")[2]
