"""One experiment of a store read for estimation: paired differences per sample, summarised per experimental unit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any, Literal

import numpy as np
import xarray as xr
import zarr
from dask.base import compute
from dask.delayed import Delayed, delayed
from numpy.typing import NDArray

from pipeline.effects.state import GroupedMoments, Key
from pipeline.fields import axes_of, field_dims_of
from pipeline.precision import HAS_STOPPED, LOOK_SAMPLES, STOPPED
from pipeline.screening import ESTIMATE, EXACT, VERIFIED
from pipeline.store import DONE as DONE
from pipeline.store import FAILED as FAILED
from pipeline.store import PENDING as PENDING
from pipeline.store import Place, locate

Unit = Literal["prompt", "sample"]
Floats = NDArray[np.float64]

ALL_PAIRS = "all"
NOT_EXPERIMENTS = frozenset({"samples", "baseline", "previews", "effects"})


def experiment_names(place: Place) -> list[str]:
    """List the experiment groups of a store, sorted.

    Raises
    ------
    FileNotFoundError : there is no store at the path.
    """
    return sorted(set(group_names(place)) - NOT_EXPERIMENTS)


def group_names(place: Place, under: str = "") -> list[str]:
    """List the groups directly in a store, or in one of its groups, from what is there now.

    Raises
    ------
    FileNotFoundError : there is no store at the path.
    """
    try:
        store = locate(place).zarr(read_only=True)
        group = zarr.open_group(store, path=under, mode="r", zarr_format=3, use_consolidated=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no store at {place}. Give the folder or URL of a run.") from error
    with no_zarr_warnings():
        return sorted(group.group_keys())


@contextmanager
def no_zarr_warnings() -> Iterator[None]:
    """Silence Zarr on two things that are so by design.

    The journal and the driver's lease lie beside the arrays, and consolidated metadata, which spares every reader a
    warning, has no words in the Zarr v3 specification yet.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Object at .* is not recognized as a component", category=UserWarning)
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part", category=UserWarning)
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Metrics of the recorded runs per sample, and the experimental unit each sample belongs to.

    Attributes
    ----------
    clean, corrupted : metrics with one number a run. fields : names of those with a field, which are not read.
    """

    keys: tuple[Key, ...]
    clean: dict[str, Floats]
    corrupted: dict[str, Floats]
    fields: tuple[str, ...] = ()

    @classmethod
    def read(cls, place: Place, unit: Unit) -> Recorded:
        """Read samples and baseline; keys are (pair, unit).

        Raises
        ------
        ValueError : ``unit`` is not one of the two.
        """
        samples = open_group(place, "samples").load()
        if unit not in ("prompt", "sample"):
            raise ValueError(f"unknown experimental unit: {unit!r}. Choose 'prompt' (seeds averaged) or 'sample'.")
        ids = samples["prompt"].values if unit == "prompt" else np.arange(samples.sizes["sample"])
        keys = tuple((str(p), str(i)) for p, i in zip(samples["pair"].values, ids, strict=True))
        baseline = open_group(place, "baseline")
        runs = {run: i for i, run in enumerate(map(str, baseline["run"].values))}
        values = {
            str(name): np.asarray(array.values, dtype=np.float64)
            for name, array in baseline.data_vars.items()
            if array.dims == ("sample", "run")
        }
        return cls(
            keys=keys,
            clean={m: v[:, runs["clean"]] for m, v in values.items()},
            corrupted={m: v[:, runs["corrupted"]] for m, v in values.items()},
            fields=tuple(str(n) for n, v in baseline.data_vars.items() if field_dims_of(map(str, v.dims))),
        )

    @property
    def pairs(self) -> tuple[str, ...]:
        """Pair kinds in order of first appearance."""
        return tuple(dict.fromkeys(pair for pair, _ in self.keys))


@dataclass(frozen=True, slots=True, kw_only=True)
class CellStates:
    """What one pass over the samples of one metric leaves, cells flattened; merges like its parts.

    Attributes
    ----------
    difference : metric in the cell minus metric of the recipient run, per (pair, unit).
    numerator, denominator : metric minus corrupted and clean minus corrupted, of the samples where both exist.
    failed : per pair, samples whose cell was due and has no finite difference.
    """

    difference: GroupedMoments
    numerator: GroupedMoments | None
    denominator: GroupedMoments | None
    failed: dict[str, NDArray[np.int64]]

    def merge(self, other: CellStates) -> CellStates:
        """Return the states of both sets of samples together."""
        failed = dict(self.failed)
        for pair, count in other.failed.items():
            failed[pair] = failed[pair] + count if pair in failed else count
        return CellStates(
            difference=self.difference.merge(other.difference),
            numerator=_merge_optional(self.numerator, other.numerator),
            denominator=_merge_optional(self.denominator, other.denominator),
            failed=failed,
        )


def _merge_optional(a: GroupedMoments | None, b: GroupedMoments | None) -> GroupedMoments | None:
    return a.merge(b) if a is not None and b is not None else None


@dataclass(frozen=True)
class Experiment:
    """One experiment group, opened lazily."""

    name: str
    dataset: xr.Dataset

    @classmethod
    def open(cls, place: Place, name: str) -> Experiment:
        """Open the group without loading its metrics."""
        return cls(name, open_group(place, name))

    @property
    def metrics(self) -> list[str]:
        """Names of the stored metrics with one number a cell."""
        return [name for name in self._measured if not field_dims_of(map(str, self.dataset[name].dims))]

    @property
    def fields(self) -> list[str]:
        """Names of the stored metrics with a field a cell."""
        return [name for name in self._measured if field_dims_of(map(str, self.dataset[name].dims))]

    @property
    def _measured(self) -> list[str]:
        found = [str(n) for n, v in self.dataset.data_vars.items() if v.dims[:1] == ("sample",) and v.dtype.kind == "f"]
        return [name for name in found if not (self.screened and name == ESTIMATE)]

    @property
    def screened(self) -> bool:
        """Whether every cell has an estimate and only some are computed."""
        return "screen" in self.dataset.attrs

    @property
    def computed(self) -> NDArray[np.bool_]:
        """Which cells are computed: shaped as the axes, or as (sample, axes) where cells may stop."""
        if self.screened:
            return np.asarray(self.dataset[EXACT].values == VERIFIED)
        shape = [self.dataset.sizes[a] for a in self.axes]
        if STOPPED not in self.dataset:
            return np.ones(shape, dtype=np.bool_)
        ends = [int(n) for n in self.dataset[LOOK_SAMPLES].values] + [self.dataset.sizes["sample"]]
        found = np.ones((ends[-1], *shape), dtype=np.bool_)
        for look, (start, stop) in enumerate(pairwise(ends)):
            found[start:stop] = self.dataset[STOPPED].values[look] != HAS_STOPPED
        return found

    @property
    def axes(self) -> tuple[str, ...]:
        """Dimensions of a cell, in stored order."""
        return axes_of(str(d) for d in self.dataset[self._measured[0]].dims[1:])

    @property
    def contrast(self) -> bool:
        """Whether a recovery between the two runs of a pair is defined."""
        return str(self.dataset.attrs.get("contrast", "false")).lower() == "true"

    @cached_property
    def status(self) -> NDArray[np.uint8]:
        """Status per unit of work; all done when the group records none."""
        if "status" not in self.dataset:
            return np.array([DONE], np.uint8)
        return np.asarray(self.dataset["status"].values, dtype=np.uint8)

    def reference(self, clean: Floats, corrupted: Floats) -> Floats:
        """Return the recipient run's metric, shaped to broadcast against (sample, axes).

        Raises
        ------
        ValueError : see ``recipients``.
        """
        run = recipients(self.dataset)
        values = {"clean": clean, "corrupted": corrupted}
        if isinstance(run, str):
            return values[run].reshape(-1, *(1,) * len(self.axes))
        (axis, names), *_ = run.items()
        shape = [len(names) if a == axis else 1 for a in self.axes]
        return np.stack([values[n] for n in names], axis=1).reshape(-1, *shape)

    def cell_status(self, metric: str) -> NDArray[np.uint8] | None:
        """Return the status of every (sample, axes) cell, None when units cannot be laid over the chunks.

        A unit of work writes whole chunks, so units are the chunks in C order, or all chunks of one sample.
        """
        array, ndim = self.dataset[metric], 1 + len(self.axes)
        shape = array.shape[:ndim]
        if (self.status == self.status[0]).all():
            return np.broadcast_to(self.status[0], shape)
        chunks = (array.encoding.get("chunks") or array.shape)[:ndim]
        grid = tuple(-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True))
        if self.status.size == prod(grid):
            codes = self.status.reshape(grid)
        elif self.status.size == grid[0]:
            codes = self.status.reshape(-1, *(1,) * (ndim - 1))
        else:
            return None
        for axis, chunk in enumerate(chunks):
            if codes.shape[axis] > 1:
                codes = np.repeat(codes, chunk, axis=axis).take(range(shape[axis]), axis=axis)
        return np.broadcast_to(codes, shape)

    def states(self, metric: str, recorded: Recorded, *, chunk_samples: int) -> CellStates:
        """Reduce one metric over samples with Dask: one state per block of samples, merged in a tree."""
        array = self.dataset[metric]
        rows = _aligned(chunk_samples, array)
        blocks = array.chunk({d: rows if d == "sample" else -1 for d in array.dims}).data.to_delayed().ravel()
        pairing = self._pairing(metric, recorded)
        level: list[Delayed] = [
            delayed(_block_states)(block, {k: v[i * rows : (i + 1) * rows] for k, v in pairing.items()}, self.contrast)
            for i, block in enumerate(blocks)
        ]
        while len(level) > 1:
            merged = [delayed(CellStates.merge)(a, b) for a, b in zip(level[::2], level[1::2], strict=False)]
            level = merged + level[len(merged) * 2 :]
        (state,) = compute(level[0], scheduler="threads")  # type: ignore[no-untyped-call]
        assert isinstance(state, CellStates)
        return state

    def _pairing(self, metric: str, recorded: Recorded) -> dict[str, Any]:
        index = self.sample_positions()
        clean, corrupted = recorded.clean[metric][index], recorded.corrupted[metric][index]
        status = self.cell_status(metric)
        due = np.zeros(self.dataset[metric].shape, bool) if status is None else status != PENDING
        return {
            "keys": [recorded.keys[i] for i in index],
            "clean": clean,
            "corrupted": corrupted,
            "reference": self.reference(clean, corrupted),
            "due": due & self.computed,
        }

    def sample_positions(self) -> NDArray[np.int64]:
        """Return the number of each of the experiment's samples among all samples."""
        if "sample" not in self.dataset.coords:
            return np.arange(self.dataset.sizes["sample"])
        return np.asarray(self.dataset["sample"].values, dtype=np.int64)


_RECIPIENT_OF = {"clean": "clean", "corrupted": "corrupted"} | {
    "denoising": "corrupted",
    "noising": "clean",
    "self": "clean",
}


def recipients(dataset: xr.Dataset) -> str | dict[str, list[str]]:
    """Return the run that an experiment changes, or the axis it depends on with one run for each position.

    Raises
    ------
    ValueError : the group's ``recipient``, or a value of the axis it names, is unknown.
    """
    recipient = str(dataset.attrs.get("recipient", "clean"))
    if recipient in ("clean", "corrupted"):
        return recipient
    axis = recipient.removeprefix("by ")
    values = [str(v) for v in dataset[axis].values] if axis in ("direction", "run") and axis in dataset.coords else []
    if not values or not set(values) <= _RECIPIENT_OF.keys():
        raise ValueError(
            f"unknown recipient of an experiment: {recipient!r} with values {values}. "
            "Expected 'clean', 'corrupted', 'by run', or 'by direction' with denoising, noising and self."
        )
    return {axis: [_RECIPIENT_OF[v] for v in values]}


def _block_states(values: NDArray[np.float32], pairing: dict[str, Any], contrast: bool) -> CellStates:
    rows = len(values)
    metric = np.asarray(values, dtype=np.float64)
    keys: list[Key] = pairing["keys"]
    difference = (metric - pairing["reference"]).reshape(rows, -1)
    lost = pairing["due"].reshape(rows, -1) & ~np.isfinite(difference)
    numerator = denominator = None
    if contrast:
        above = metric.reshape(rows, -1) - pairing["corrupted"][:, None]
        gap = np.broadcast_to((pairing["clean"] - pairing["corrupted"])[:, None], above.shape)
        both = np.isfinite(above) & np.isfinite(gap)
        numerator = GroupedMoments.of(np.where(both, above, np.nan), keys)
        denominator = GroupedMoments.of(np.where(both, gap, np.nan), keys)
    of_pair = {pair: [k[0] == pair for k in keys] for pair in sorted({k[0] for k in keys})}
    return CellStates(
        difference=GroupedMoments.of(difference, keys),
        numerator=numerator,
        denominator=denominator,
        failed={pair: lost[members].sum(axis=0, dtype=np.int64) for pair, members in of_pair.items()},
    )


def _aligned(chunk_samples: int, array: xr.DataArray) -> int:
    if chunk_samples < 1:
        raise ValueError(f"chunk_samples is {chunk_samples}. Give at least 1.")
    stored = (array.encoding.get("chunks") or array.shape)[0]
    return -(-chunk_samples // stored) * int(stored)


def open_group(place: Place, name: str) -> xr.Dataset:
    """Open one group lazily, past the consolidated metadata, which may be older than the data."""
    store = locate(place).zarr(read_only=True)
    # Format 2 has arrays of pickled objects.
    dataset: xr.Dataset = xr.open_zarr(store, group=name, chunks=None, consolidated=False, zarr_format=3)
    return dataset


def cell_blocks(cells: int, replicates: int, megabytes: int = 64) -> Iterator[slice]:
    """Cut the cells so that one block of bootstrap replicates in float64 stays below ``megabytes``."""
    width = max(1, megabytes * 2**20 // (8 * replicates))
    for start in range(0, cells, width):
        yield slice(start, min(start + width, cells))
