"""The regions of a store: what replicas write, and the status and selections that the driver alone writes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from pipeline.fields import axes_of
from pipeline.precision import GOES_ON, HAS_STOPPED, NOT_LOOKED, STOPPED
from pipeline.screening import DRAWN, ESTIMATE, ESTIMATED, EXACT, OPEN, VERIFIED, Selection
from pipeline.store.errors import CorruptedError, StoreError, reading, writing
from pipeline.store.location import Place, locate


def has_axes(array: Any) -> bool:
    """Whether an experiment's array has axes besides sample and those of a field, so that units are windows of it."""
    return len(axes_of(array.metadata.dimension_names or range(array.ndim))) > 1


def chunk_key(array: Any, position: tuple[int, ...]) -> str:
    """Return the key of a chunk of an array by its position in the grid of chunks."""
    return f"{array.path}/{array.metadata.encode_chunk_key(position)}"


class Store:
    """One sweep's store, open for writing regions (replicas) or status (the driver)."""

    def __init__(self, place: Place) -> None:
        self.location = locate(place)
        self.root: Any = zarr.open_group(self.location.zarr(), mode="r+", zarr_format=3, use_consolidated=False)
        self._arrays: dict[str, Any] = {}

    @property
    def config_hash(self) -> str:
        """The sha256 of the config that the store was created for."""
        return str(self.root.attrs["config_sha256"])

    def write_cells(
        self, group: str, values: Mapping[str, NDArray[np.float32]], sample: int, start: int, stop: int
    ) -> int:
        """Write one unit: for each metric an array (stop - start, *other axes, *field), whole chunks only.

        Returns
        -------
        Bytes written, uncompressed.

        Raises
        ------
        StoreError : a value does not have the shape of its region, or the region is not whole chunks.
        StorageFullError, StorageReadOnlyError : the storage takes no more.
        """
        for name, value in values.items():
            array = self.array(f"{group}/{name}")
            windowed = has_axes(array)
            lead = array.shape[1] if windowed else 1
            region = f"{group}/{name}[{sample}, {start}:{stop}]"
            expected = (stop - start, *array.shape[2:]) if windowed else array.shape[1:]
            if value.shape != expected:
                raise StoreError(
                    f"region {region} has shape {expected}, the values have {value.shape}. Nothing was written."
                )
            if not 0 <= start < stop <= lead:
                raise StoreError(f"region {region} is not inside 0:{lead}. Nothing was written.")
            if windowed and (start % array.chunks[1] or (stop % array.chunks[1] and stop != lead)):
                raise StoreError(f"region {region} is not whole chunks of {array.chunks[1]}. Nothing was written.")
        for name, value in values.items():
            array = self.array(f"{group}/{name}")
            with writing(self.location, f"{group}/{name}[{sample}, {start}:{stop}]"):
                if has_axes(array):
                    array[sample, start:stop] = value
                else:
                    array[sample] = value
        return sum(value.nbytes for value in values.values())

    def write_sample(self, group: str, values: Mapping[str, NDArray[Any]], sample: int) -> int:
        """Write whole samples of a group's arrays, each of shape ``array.shape[1:]``; returns bytes.

        Raises
        ------
        StoreError : a value does not have the shape of its region.
        StorageFullError, StorageReadOnlyError : the storage takes no more.
        """
        for name, value in values.items():
            shape, region = self.array(f"{group}/{name}").shape[1:], f"{group}/{name}[{sample}]"
            if np.shape(value) != shape:
                raise StoreError(
                    f"region {region} has shape {shape}, the values have {np.shape(value)}. Nothing was written."
                )
        for name, value in values.items():
            array = self.array(f"{group}/{name}")
            with writing(self.location, f"{group}/{name}[{sample}]"):
                array[sample] = value
        return sum(int(np.asarray(v).nbytes) for v in values.values())

    def chosen(self, group: str, start: int, stop: int) -> NDArray[np.bool_] | None:
        """Return which cells of a unit of a screened experiment are computed, flat; None if that is still open.

        Raises
        ------
        CorruptedError : the selection cannot be read.
        """
        array = self.array(f"{group}/{EXACT}")
        with reading(self.location, f"{group}/{EXACT}"):
            values = np.asarray(array[start:stop] if array.ndim else array[...], dtype=np.uint8).ravel()
        return None if (values == OPEN).any() else values == VERIFIED

    def estimates(self, group: str) -> Iterator[NDArray[np.float32]]:
        """Yield the estimates of each sample of a screened experiment.

        Raises
        ------
        CorruptedError : they cannot be read, or are missing.
        """
        array = self.array(f"{group}/{ESTIMATE}")
        for sample in range(array.shape[0]):
            with reading(self.location, f"{group}/{ESTIMATE}[{sample}]"):
                values = np.asarray(array[sample], dtype=np.float32)
            # A chunk that is gone reads as NaN, and other cells would be chosen for good.
            if np.isnan(values).all() and not self.location.exists(chunk_key(array, (sample, *[0] * values.ndim))):
                raise CorruptedError(
                    f"store {self.location}: {group}/{ESTIMATE}[{sample}] is missing. "
                    f"Check the store with: stepscope verify {self.location}"
                )
            yield values

    def write_selection(self, group: str, selection: Selection) -> None:
        """Write which cells of a screened experiment are computed; the driver alone does this, once."""
        drawn, exact = self.array(f"{group}/{DRAWN}"), self.array(f"{group}/{EXACT}")
        with writing(self.location, f"{group}/{EXACT}"):
            drawn[...] = selection.drawn.astype(np.uint8)
            # Last, and one chunk: whoever reads it finds nothing chosen or everything.
            exact[...] = np.where(selection.exact, VERIFIED, ESTIMATED).astype(np.uint8)

    def sample_values(self, path: str, samples: int, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Read a metric of the first samples, all of it or a unit's window of the first axis.

        Raises
        ------
        CorruptedError : a value cannot be read, or the chunk that it must be in is missing.
        """
        array = self.array(path)
        with reading(self.location, path):
            found = np.asarray(array[:samples, start:stop] if array.ndim > 1 else array[:samples], dtype=np.float32)
        # A chunk that is gone reads as NaN, and other cells would stop for good.
        for sample in np.flatnonzero(np.isnan(found.reshape(samples, -1)).all(axis=1)):
            window = start // array.chunks[1] if array.ndim > 1 else 0
            key = chunk_key(array, (int(sample), window, *[0] * array.ndim)[: array.ndim])
            if not self.location.exists(key):
                raise CorruptedError(
                    f"store {self.location}: {key} is missing. Check the store with: stepscope verify {self.location}"
                )
        return found

    def stopped(self, group: str, look: int, start: int = 0, stop: int | None = None) -> NDArray[np.bool_] | None:
        """Return which cells of an experiment have stopped by a look, or those of a unit; None if it is not made.

        Raises
        ------
        CorruptedError : the look cannot be read.
        """
        array = self.array(f"{group}/{STOPPED}")
        with reading(self.location, f"{group}/{STOPPED}[{look}]"):
            values = np.asarray(array[look, start:stop] if array.ndim > 1 else array[look], dtype=np.uint8)
        return None if (values == NOT_LOOKED).any() else values == HAS_STOPPED

    def write_look(self, group: str, look: int, stopped: NDArray[np.bool_]) -> None:
        """Write which cells have stopped by a look; the driver alone does this, once."""
        array = self.array(f"{group}/{STOPPED}")
        with writing(self.location, f"{group}/{STOPPED}[{look}]"):
            # One chunk: whoever reads it finds nothing or everything.
            array[look] = np.where(stopped, HAS_STOPPED, GOES_ON).astype(np.uint8)

    def reset_look(self, group: str, look: int) -> None:
        """Forget a look; the driver makes the same one again."""
        array = self.array(f"{group}/{STOPPED}")
        with writing(self.location, f"{group}/{STOPPED}[{look}]"):
            array[look] = np.full(array.shape[1:], NOT_LOOKED, dtype=np.uint8)

    def status(self, group: str) -> NDArray[np.uint8]:
        """Read a group's status, one value a unit.

        Raises
        ------
        CorruptedError : it cannot be read.
        """
        array = self.array(f"{group}/status")
        with reading(self.location, f"{group}/status"):
            return np.asarray(array[:], dtype=np.uint8)

    def groups(self) -> list[str]:
        """List the groups that have a status."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Object at .* is not recognized")
            return sorted(name for name, group in self.root.groups() if "status" in group)

    def write_status(self, group: str, values: NDArray[np.uint8]) -> None:
        """Write a group's status; the driver alone does this, after the data."""
        array = self.array(f"{group}/status")
        with writing(self.location, f"{group}/status"):
            array[:] = values

    def reset_selection(self, group: str) -> None:
        """Forget which cells of a screened experiment are computed; the driver chooses the same ones again."""
        for name in (EXACT, DRAWN):
            array = self.array(f"{group}/{name}")
            with writing(self.location, f"{group}/{name}"):
                array[...] = np.full(array.shape, OPEN, dtype=np.uint8)

    def sweep_partial_files(self) -> int:
        """Delete the temporary files that killed writers left behind; returns how many."""
        return self.location.sweep_partial()

    def array(self, key: str) -> Any:
        """Return an array by its path; its metadata is read once, as it never changes."""
        if key not in self._arrays:
            # The setting is no part of an array's metadata, so what creation chose does not hold here.
            self._arrays[key] = self.root[key].with_config({"write_empty_chunks": True})
        return self._arrays[key]
