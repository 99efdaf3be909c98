"""The template of a store: every group, coordinate and empty array of a plan, before any unit has run."""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from interventions.screen import FORMULA
from interventions.sites import RUNS
from pipeline.experiment import Grid
from pipeline.fields import FIELD_DIMS
from pipeline.metrics.metric import Metric
from pipeline.metrics.objective import OBJECTIVES
from pipeline.plan import BASELINE, Plan
from pipeline.precision import (
    GOES_ON,
    HAS_STOPPED,
    LOOK,
    LOOK_SAMPLES,
    NOT_LOOKED,
    STOPPED,
    Precision,
    describe_interval,
)
from pipeline.screening import DRAWN, ESTIMATE, ESTIMATED, EXACT, OPEN, RANKING, VERIFIED, Screen
from pipeline.store.journal import DONE, FAILED, PENDING
from pipeline.store.location import Place, locate

SCHEMA_VERSION = 2
PREVIEW_RUNS = (*RUNS, "patched")
CODEC = ZstdCodec(level=1, checksum=True)
"""Of every array: Zarr's default has no checksum, and a flipped bit would be a wrong number."""


def write_template(store: Any, plan: Plan) -> None:
    """Write a plan's template into a Zarr store that is empty: a function of the plan, but for the time and machine."""
    root = zarr.create_group(store, zarr_format=3, attributes=_root_attributes(plan))
    _write_samples(root, plan)
    _create_baseline(root, plan)
    if plan.config.previews.samples:
        _create_previews(root, plan)
    for grid in plan.grids:
        _create_experiment(root, plan, grid)
    _consolidate(store)


def template_of(plan: Plan) -> dict[str, bytes]:
    """Return a plan's template as the bytes of its keys."""
    from zarr.storage import MemoryStore

    content: dict[str, Any] = {}
    write_template(MemoryStore(content), plan)
    return {key: value.to_bytes() for key, value in content.items()}


def consolidate(place: Place) -> None:
    """Consolidate metadata, so that xarray opens the store in one read and without a warning."""
    _consolidate(locate(place).zarr())


def _consolidate(store: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        # Journal and lease lie beside the arrays on purpose.
        warnings.filterwarnings("ignore", message="Object at .* is not recognized")
        zarr.consolidate_metadata(store)


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
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=values.shape,
        compressors=[CODEC],
        dimension_names=dims,
        attributes=attributes,
        config={"write_empty_chunks": True},
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
        compressors=[CODEC],
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
        compressors=[CODEC],
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


def _field_coordinates(group: Any, plan: Plan) -> None:
    used = {d for metric in plan.metrics for d in metric.dims}
    for name, size in zip(FIELD_DIMS, plan.latent_shape if used else (0, 0, 0), strict=True):
        if name in used:
            about = {"long_name": name.replace("_", " "), "description": "position in the latents, from 0"}
            _put(group, name, (name,), np.arange(size), **about)


def _allocate_metric(
    group: Any, plan: Plan, metric: Metric, dims: tuple[str, ...], shape: tuple[int, ...], chunks: tuple[int, ...]
) -> None:
    """Create a metric's array: the dimensions of its cells, then those of its field, which is never cut."""
    field = plan.field_shape(metric)
    about = {"long_name": metric.long_name, "units": "1", "description": metric.description}
    _allocate(group, metric.name, (*dims, *metric.dims), (*shape, *field), (*chunks, *field), **about)


def _create_baseline(root: Any, plan: Plan) -> None:
    n, steps = len(plan.samples), plan.geometry.steps
    group = root.create_group(BASELINE)
    _put(group, "sample", ("sample",), np.arange(n))
    _put(group, "run", ("run",), list(RUNS))
    _step_coordinates(group, plan, tuple(range(steps)))
    _field_coordinates(group, plan)
    for metric in plan.metrics:
        about = {"long_name": metric.long_name, "units": "1", "description": metric.description}
        _allocate_metric(group, plan, metric, ("sample", "run"), (n, 2), (1, 2))
        if metric.dims:
            continue
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
        compressors=[CODEC],
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
    _field_coordinates(group, plan)
    for metric in plan.metrics:
        _allocate_metric(group, plan, metric, ("sample", *grid.dims), (n, *grid.shape), chunks)
    _status(group, plan.group_units(experiment.name))
    if experiment.screen is not None:
        _create_screening(group, plan, grid, experiment.screen)
    if experiment.precision is not None:
        _create_looks(group, plan, grid, experiment.precision)


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
            compressors=[CODEC],
            dimension_names=grid.dims,
            attributes={
                "flag_values": [ESTIMATED, VERIFIED, OPEN],
                "flag_meanings": "estimate_only verified not_chosen_yet" if name == EXACT else "no yes not_chosen_yet",
                "description": what,
            },
        )


def _create_looks(group: Any, plan: Plan, grid: Grid, precision: Precision) -> None:
    rounds = plan.rounds[grid.experiment.name]
    level = rounds.level(precision)
    about = {"looks": rounds.looks, "prompts": rounds.prompts, "level_at_look": level}
    method = describe_interval("prompt", precision.by, precision.level, level, rounds.looks)
    group.attrs["precision"] = json.dumps({**precision.model_dump(), **about, "interval": method})
    looks = rounds.looks - 1
    _put(group, LOOK, (LOOK,), np.array(rounds.problems[:looks], dtype=np.int64), long_name="problems before the look")
    samples = np.array(rounds.samples[:looks], dtype=np.int64)
    _put(group, LOOK_SAMPLES, (LOOK,), samples, long_name="samples before the look")
    group.create_array(
        STOPPED,
        shape=(looks, *grid.shape),
        dtype="uint8",
        chunks=(1, *grid.shape),
        fill_value=NOT_LOOKED,
        compressors=[CODEC],
        dimension_names=(LOOK, *grid.dims),
        attributes={
            "flag_values": [GOES_ON, HAS_STOPPED, NOT_LOOKED],
            "flag_meanings": "goes_on stopped not_looked_yet",
            "description": "1: the interval of the cell was narrow enough by this look, and for later samples its "
            "metrics are not computed and NaN; 0: it is computed further",
        },
        config={"write_empty_chunks": True},
    )
