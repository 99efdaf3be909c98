"""The Zarr store of a sweep: its template, region writes, status, journal and the lock of its one driver."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from interventions.screen import FORMULA
from interventions.sites import RUNS
from pipeline.experiment import Grid
from pipeline.metrics.objective import OBJECTIVES
from pipeline.plan import BASELINE, Plan
from pipeline.screening import DRAWN, ESTIMATE, ESTIMATED, EXACT, OPEN, RANKING, VERIFIED, Screen, Selection

SCHEMA_VERSION = 2
PENDING, DONE, FAILED = 0, 1, 2
PREVIEW_RUNS = (*RUNS, "patched")
_CODEC = ZstdCodec(level=1, checksum=True)


class StoreError(ValueError):
    """A path that cannot serve as the store of this sweep; the message says why and what to do."""


class Store:
    """One sweep's store, open for writing regions (replicas) or status (the driver)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = zarr.open_group(str(path), mode="r+", zarr_format=3, use_consolidated=False)

    @property
    def config_hash(self) -> str:
        """The sha256 of the config that the store was created for."""
        return str(self.root.attrs["config_sha256"])

    def write_cells(
        self, group: str, values: Mapping[str, NDArray[np.float32]], sample: int, start: int, stop: int
    ) -> int:
        """Write one unit: for each metric an array (stop - start, *other axes), whole chunks only.

        Returns
        -------
        Bytes written, uncompressed.

        Raises
        ------
        StoreError : a value does not have the shape of its region, or the region is not whole chunks.
        """
        for name, value in values.items():
            array = self._array(f"{group}/{name}")
            lead = array.shape[1] if array.ndim > 1 else 1
            region = f"{group}/{name}[{sample}, {start}:{stop}]"
            expected = (stop - start, *array.shape[2:]) if array.ndim > 1 else ()
            if value.shape != expected:
                raise StoreError(
                    f"region {region} has shape {expected}, the values have {value.shape}. Nothing was written."
                )
            if not 0 <= start < stop <= lead:
                raise StoreError(f"region {region} is not inside 0:{lead}. Nothing was written.")
            if array.ndim > 1 and (start % array.chunks[1] or (stop % array.chunks[1] and stop != lead)):
                raise StoreError(f"region {region} is not whole chunks of {array.chunks[1]}. Nothing was written.")
        for name, value in values.items():
            array = self._array(f"{group}/{name}")
            if array.ndim > 1:
                array[sample, start:stop] = value
            else:
                array[sample] = value
        return sum(value.nbytes for value in values.values())

    def write_sample(self, group: str, values: Mapping[str, NDArray[Any]], sample: int) -> int:
        """Write whole samples of a group's arrays, each of shape ``array.shape[1:]``; returns bytes.

        Raises
        ------
        StoreError : a value does not have the shape of its region.
        """
        for name, value in values.items():
            shape, region = self._array(f"{group}/{name}").shape[1:], f"{group}/{name}[{sample}]"
            if np.shape(value) != shape:
                raise StoreError(
                    f"region {region} has shape {shape}, the values have {np.shape(value)}. Nothing was written."
                )
        for name, value in values.items():
            self._array(f"{group}/{name}")[sample] = value
        return sum(int(np.asarray(v).nbytes) for v in values.values())

    def chosen(self, group: str, start: int, stop: int) -> NDArray[np.bool_] | None:
        """Return which cells of a unit of a screened experiment are computed, flat; None if that is still open."""
        array = self._array(f"{group}/{EXACT}")
        values = np.asarray(array[start:stop] if array.ndim else array[...], dtype=np.uint8).ravel()
        return None if (values == OPEN).any() else values == VERIFIED

    def estimates(self, group: str) -> Iterator[NDArray[np.float32]]:
        """Yield the estimates of each sample of a screened experiment."""
        array = self._array(f"{group}/{ESTIMATE}")
        for sample in range(array.shape[0]):
            yield np.asarray(array[sample], dtype=np.float32)

    def write_selection(self, group: str, selection: Selection) -> None:
        """Write which cells of a screened experiment are computed; the driver alone does this, once."""
        self._array(f"{group}/{DRAWN}")[...] = selection.drawn.astype(np.uint8)
        # Last, and one chunk: whoever reads it finds nothing chosen or everything.
        self._array(f"{group}/{EXACT}")[...] = np.where(selection.exact, VERIFIED, ESTIMATED).astype(np.uint8)

    def status(self, group: str) -> NDArray[np.uint8]:
        """Read a group's status, one value a unit."""
        return np.asarray(self._array(f"{group}/status")[:], dtype=np.uint8)

    def groups(self) -> list[str]:
        """List the groups that have a status."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Object at .* is not recognized")
            return sorted(name for name, group in self.root.groups() if "status" in group)

    def write_status(self, group: str, values: NDArray[np.uint8]) -> None:
        """Write a group's status; the driver alone does this, after the data."""
        self._array(f"{group}/status")[:] = values

    def sweep_partial_files(self) -> int:
        """Delete the temporary files that killed writers left behind; returns how many."""
        leftovers = list(self.path.rglob("*.partial"))
        for file in leftovers:
            file.unlink(missing_ok=True)
        return len(leftovers)

    def _array(self, key: str) -> Any:
        # The setting is no part of an array's metadata, so what creation chose does not hold here.
        array: Any = self.root[key]
        return array.with_config({"write_empty_chunks": True})


class DriverLock:
    """The exclusive right to drive a store; the operating system takes it back when the process dies."""

    def __init__(self, path: Path) -> None:
        self.path = path / "driver.lock"
        self._handle: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises
        ------
        StoreError : another process drives this store, or it is not writable.
        """
        try:
            handle = self.path.open("a+")
        except OSError as error:
            raise StoreError(f"store {self.path.parent} cannot be written: {error.strerror}: {self.path}.") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            handle.close()
            raise StoreError(
                f"store {self.path.parent} is being driven by {holder}. Wait for it or stop it."
            ) from error
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {platform.node()}")
        handle.flush()
        self._handle = handle

    def release(self) -> None:
        """Give the lock back."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None


class Journal:
    """Append-only lines of JSON, one for each finished attempt, flushed as they come."""

    def __init__(self, store: Path) -> None:
        self.path = store / "journal.jsonl"

    def append(self, **entry: Any) -> None:
        """Append one entry with the time of writing, on a line of its own even after a torn one."""
        line = json.dumps({"time": round(time.time(), 3), **entry}) + "\n"
        with self.path.open("ab+") as handle:
            if handle.tell():
                handle.seek(-1, os.SEEK_END)
                if handle.read() != b"\n":
                    line = "\n" + line
            handle.write(line.encode())

    def entries(self) -> list[dict[str, Any]]:
        """Read all entries; a last line torn by a kill is ignored."""
        if not self.path.is_file():
            return []
        entries = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entries.append(json.loads(line))
            except (ValueError, RecursionError):
                continue
        return entries


def is_store(path: Path) -> bool:
    """Return whether a path holds a store of ours."""
    try:
        attrs = json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
    return isinstance(attrs, dict) and {"config_sha256", "schema_version"} <= attrs.keys()


def open_store(path: Path) -> Store:
    """Open an existing store.

    Raises
    ------
    StoreError : the path is not a store, or was written by a newer schema.
    """
    if not is_store(path):
        what = "does not exist" if not os.path.exists(path) else "is not a stepscope store"
        raise StoreError(f"{path} {what}. Create one with: stepscope run CONFIG --store {path}")
    try:
        store = Store(path)
    except (OSError, ValueError, LookupError) as error:
        raise StoreError(f"store {path} cannot be opened for writing: {error}") from error
    found = int(str(store.root.attrs["schema_version"]))
    if found > SCHEMA_VERSION:
        raise StoreError(
            f"store {path} has schema version {found}, this stepscope reads up to {SCHEMA_VERSION}. Update it."
        )
    return store


def open_or_create(path: Path, plan: Plan) -> Store:
    """Open the store of this very config, or create it whole: every array allocated, every unit pending.

    Raises
    ------
    StoreError : the path holds something else, or another config (with the differing keys), or is not writable.
    """
    if is_store(path):
        store = open_store(path)
        found = int(str(store.root.attrs["schema_version"]))
        if found != SCHEMA_VERSION:
            # Older ones order the axes of an experiment otherwise.
            raise StoreError(
                f"store {path} was begun with schema version {found}, this stepscope writes {SCHEMA_VERSION}. "
                "Finish it with the version that began it, or use another --store."
            )
        if store.config_hash != plan.config.hash():
            stored = json.loads(str(store.root.attrs["config_json"]))
            keys = "; ".join(differing(stored, plan.config.identity()))
            raise StoreError(
                f"store {path} holds another config. Differing: {keys}. Use another --store, or that config."
            )
        if store.root.attrs["model_digest"] != plan.model.digest:
            raise StoreError(
                f"store {path} was computed with other weights or settings of {plan.model.id}. Use another --store."
            )
        return store
    if path.name in ("", ".."):
        raise StoreError(f"{path} has no name of its own. Name a new folder with --store.")
    # Of this process alone: two first starts at once must not build in the same place.
    building = path.with_name(f"{path.name}.{os.getpid()}.building")
    try:
        # os.path.exists is False where pathlib raises, as below a folder that may not be read.
        if os.path.exists(path) and (not path.is_dir() or any(path.iterdir())):
            raise StoreError(f"{path} exists and is not a stepscope store. Use another --store.")
        path.parent.mkdir(parents=True, exist_ok=True)
        for rest in path.parent.glob(f"{path.name}.*.building"):
            if not _is_alive(rest.name.split(".")[-2]):
                _remove(rest)
        try:
            _create(building, plan)
            try:
                if path.exists():
                    path.rmdir()
                building.rename(path)
            except OSError:
                if not is_store(path):
                    raise
                # Another first start was faster: what it made is this store, or is refused like any other.
                _remove(building)
                return open_or_create(path, plan)
        except BaseException:
            _remove(building)
            raise
    except OSError as error:
        raise StoreError(
            f"cannot create store {path}: {error.strerror or error}. Choose a writable --store."
        ) from error
    return Store(path)


def differing(a: Any, b: Any, prefix: str = "") -> list[str]:
    """List the key paths in which two configs differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            line
            for key in sorted({*a, *b})
            for line in differing(a.get(key), b.get(key), f"{prefix}.{key}".lstrip("."))
        ]
    return [] if a == b else [f"{prefix} is {json.dumps(a)} in the store, {json.dumps(b)} in the config"]


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        return True
    return True


def _remove(folder: Path) -> None:
    import shutil

    if folder.exists():
        shutil.rmtree(folder)


def _create(path: Path, plan: Plan) -> None:
    root = zarr.create_group(str(path), zarr_format=3, attributes=_root_attributes(plan))
    _write_samples(root, plan)
    _create_baseline(root, plan)
    if plan.config.previews.samples:
        _create_previews(root, plan)
    for grid in plan.grids:
        _create_experiment(root, plan, grid)
    consolidate(path)


def consolidate(path: Path) -> None:
    """Consolidate metadata, so that xarray opens the store in one read and without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        # Journal and lock lie beside the arrays on purpose.
        warnings.filterwarnings("ignore", message="Object at .* is not recognized")
        zarr.consolidate_metadata(str(path))


def _root_attributes(plan: Plan) -> dict[str, Any]:
    return {
        "title": f"stepscope sweep {plan.config.name}",
        "schema_version": SCHEMA_VERSION,
        "config_json": json.dumps(plan.config.identity()),
        "config_sha256": plan.config.hash(),
        "code_version": _version("stepscope"),
        "model": json.dumps(
            {
                "id": plan.model.id,
                "family": plan.model.family,
                "pipeline": plan.model.pipeline_config["_class_name"],
                "blocks": plan.geometry.blocks,
                "fingerprint": plan.model.fingerprint,
            }
        ),
        "model_digest": plan.model.digest,
        "solver": plan.geometry.solver,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "libraries": json.dumps(
            {n: _version(n) for n in ("torch", "diffusers", "nnsight", "ray", "zarr", "dask", "numpy")}
        ),
        "hardware": json.dumps({"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count()}),
        "experimental_unit": "prompt",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _put(group: Any, name: str, dims: tuple[str, ...], data: Any, **attributes: Any) -> None:
    """Write a small array whole: a coordinate or a per-sample fact."""
    values = np.asarray(data)
    if values.dtype.kind in "UO":
        values = values.astype(np.dtypes.StringDType())
    array = group.create_array(
        name, shape=values.shape, dtype=values.dtype, chunks=values.shape, dimension_names=dims, attributes=attributes
    )
    array[...] = values


def _allocate(
    group: Any, name: str, dims: tuple[str, ...], shape: tuple[int, ...], chunks: tuple[int, ...], **attributes: Any
) -> None:
    group.create_array(
        name,
        shape=shape,
        dtype="float32",
        chunks=chunks,
        fill_value=float("nan"),
        compressors=[_CODEC],
        dimension_names=dims,
        attributes=attributes,
        config={"write_empty_chunks": True},
    )


def _status(group: Any, units: int) -> None:
    array = group.create_array(
        "status",
        shape=(units,),
        dtype="uint8",
        chunks=(units,),
        dimension_names=("unit",),
        attributes={"flag_values": [PENDING, DONE, FAILED], "flag_meanings": "pending done failed"},
        config={"write_empty_chunks": True},
    )
    array[:] = PENDING


def _write_samples(root: Any, plan: Plan) -> None:
    group = root.create_group("samples")
    _put(group, "sample", ("sample",), np.arange(len(plan.samples)))
    for name, what in (
        ("prompt", "problem, the experimental unit"),
        ("pair", "clean/corrupted prompt"),
        ("clean_prompt", "prompt of the clean run"),
        ("corrupted_prompt", "prompt of the corrupted run"),
    ):
        _put(group, name, ("sample",), [getattr(s, name) for s in plan.samples], long_name=what)
    _put(group, "seed", ("sample",), [s.seed for s in plan.samples], long_name="seed of the initial noise")
    _put(
        group, "parameters", ("sample",), [json.dumps(s.parameters) for s in plan.samples], long_name="task parameters"
    )


def _step_coordinates(group: Any, plan: Plan, steps: tuple[int, ...]) -> None:
    sigmas = [sigma for _, sigma in plan.geometry.levels]
    _put(group, "step", ("step",), np.asarray(steps, dtype=np.int64), long_name="solver step")
    _put(group, "sigma", ("step",), [sigmas[s] for s in steps], long_name="noise level entering the step", units="1")
    group.attrs["coordinates"] = "sigma"


def _create_baseline(root: Any, plan: Plan) -> None:
    n, steps = len(plan.samples), plan.geometry.steps
    group = root.create_group(BASELINE)
    _put(group, "sample", ("sample",), np.arange(n))
    _put(group, "run", ("run",), list(RUNS))
    _step_coordinates(group, plan, tuple(range(steps)))
    for metric in plan.metrics:
        about = {"long_name": metric.long_name, "units": "1", "description": metric.description}
        _allocate(group, metric.name, ("sample", "run"), (n, 2), (1, 2), **about)
        by_step = f"{metric.long_name} of the decoded clean estimate"
        _allocate(
            group,
            f"{metric.name}_by_step",
            ("sample", "run", "step"),
            (n, 2, steps),
            (1, 2, steps),
            **{**about, "long_name": by_step},
        )
        if metric.floor is not None:
            floor = f"{metric.long_name} of a video that does nothing"
            _put(
                group,
                f"{metric.name}_floor",
                ("sample",),
                np.array([metric.floor(s) for s in plan.samples], dtype=np.float32),
                **{**about, "long_name": floor},
            )
    _status(group, n)


def _create_previews(root: Any, plan: Plan) -> None:
    group = root.create_group("previews")
    chosen, g = plan.config.previews.samples, plan.geometry
    _put(group, "preview", ("preview",), np.asarray(chosen, dtype=np.int64), long_name="sample shown")
    _put(group, "run", ("run",), list(PREVIEW_RUNS))
    _put(group, "frame", ("frame",), np.arange(g.frames), long_name="latent frame")
    _step_coordinates(group, plan, tuple(range(g.steps)))
    patched = plan.patched.model_dump(mode="json") if plan.patched is not None else None
    group.attrs["patched"] = json.dumps(patched)
    shape = (len(chosen), len(PREVIEW_RUNS), g.steps, g.frames, *plan.task.preview_size(), 3)
    array = group.create_array(
        "x0_hat",
        shape=shape,
        dtype="uint8",
        chunks=(1, *shape[1:]),
        compressors=[_CODEC],
        dimension_names=("preview", "run", "step", "frame", "y", "x", "rgb"),
        attributes={"long_name": "decoded clean estimate", "units": "1", "description": "RGB, 0 to 255"},
        config={"write_empty_chunks": True},
    )
    assert array.shape == shape


def _create_experiment(root: Any, plan: Plan, grid: Grid) -> None:
    n, experiment = len(plan.samples), grid.experiment
    recipient: str = next(grid.interventions()).recipient
    for axis in ("direction", "run"):
        if axis in grid.dims:
            recipient = f"by {axis}"
    group = root.create_group(
        experiment.name,
        attributes={
            "kind": experiment.kind,
            "formula": experiment.cls.formula,
            "contrast": "true" if experiment.cls.contrast else "false",
            "fixed": json.dumps(dict(experiment.fixed)),
            "recipient": recipient,
        },
    )
    _put(group, "sample", ("sample",), np.arange(n))
    for name, values in grid.axes:
        if name == "step":
            _step_coordinates(group, plan, values)
        else:
            _put(group, name, (name,), list(values))
    width = plan.window(grid)
    chunks = (1, width, *grid.shape[1:]) if grid.shape else (1,)
    for metric in plan.metrics:
        about = {"long_name": metric.long_name, "units": "1", "description": metric.description}
        _allocate(group, metric.name, ("sample", *grid.dims), (n, *grid.shape), chunks, **about)
    _status(group, plan.group_units(experiment.name))
    if experiment.screen is not None:
        _create_screening(group, plan, grid, experiment.screen)


def _create_screening(group: Any, plan: Plan, grid: Grid, screen: Screen) -> None:
    group.attrs["screen"] = json.dumps({**screen.model_dump(), "ranking": RANKING, "formula": FORMULA})
    objective = OBJECTIVES[screen.metric]
    _allocate(
        group,
        ESTIMATE,
        ("sample", *grid.dims),
        (len(plan.samples), *grid.shape),
        (1, *grid.shape),
        long_name=f"estimated effect on {objective.name}",
        units="1",
        description="First-order estimate, from one backward, of the change of this objective of the step's own clean "
        f"estimate, times the share of it that enters the next latents. Never a measured effect. Objective: "
        f"{objective.description}",
    )
    for name, what in (
        (EXACT, "1: the metrics are computed exactly; 0: only the estimate is known and the metrics are NaN"),
        (DRAWN, "1: the cell is computed because it was drawn at random, not for its estimate"),
    ):
        group.create_array(
            name,
            shape=grid.shape,
            dtype="uint8",
            chunks=grid.shape,
            fill_value=OPEN,
            dimension_names=grid.dims,
            attributes={
                "flag_values": [ESTIMATED, VERIFIED, OPEN],
                "flag_meanings": "estimate_only verified not_chosen_yet" if name == EXACT else "no yes not_chosen_yet",
                "description": what,
            },
        )
