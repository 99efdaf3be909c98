"""Commands that start from a config: run a sweep, or say what it would take."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from pipeline.commands.options import (
    FAILED,
    INTERRUPTED,
    METRICS_HOST,
    OK,
    AllowMetric,
    AllowPickledWeights,
    Config,
    MetricsHost,
    MetricsPort,
    Set,
    UsageError,
    allowed,
    app,
    say,
    whole_number,
)
from pipeline.permissions import NOTHING, Permissions

if TYPE_CHECKING:
    from pipeline.observers import Observer
    from pipeline.plan import Cost, Plan
    from pipeline.store import Location


@app.command
def run(
    config: Config,
    *,
    store: Annotated[
        str | None, Parameter(help="Where results go: a folder, s3://... or gs://...; default runs/NAME.zarr.")
    ] = None,
    set_: Set = None,
    replicas: Annotated[
        int | None, Parameter(converter=whole_number, help="Model replicas; 0 runs in this process without Ray.")
    ] = None,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = METRICS_HOST,
    allow_metric: AllowMetric = None,
    allow_pickled_weights: AllowPickledWeights = False,
) -> int:
    """Run a sweep, or the rest of one: the same command resumes an interrupted store.

    Replicas are Ray actors on this machine, or on the cluster named by RAY_ADDRESS.
    Ctrl-C, SIGTERM and `stepscope cancel` let the units in flight finish; once more stops at once.
    Exit code 0: every cell has a value; 1: some failed; 2: bad input; 130: interrupted.

    Example: ``stepscope run configs/maze_demo.yaml --store runs/demo.zarr --set sampler.steps=10``
    """
    from pipeline.executors import inline_executor, ray_executor
    from pipeline.foreign import require_plain
    from pipeline.sweep import run_sweep

    plan, place = bind(config, set_ or [], store, replicas, allowed(allow_metric, allow_pickled_weights))
    require_plain(place)
    executor = inline_executor if plan.config.run.replicas == 0 else ray_executor
    with watched(metrics_port, metrics_host) as (observe, on_start):
        result = run_sweep(plan, place, make_executor=executor, observe=observe, on_start=on_start, say=say)
    if result.interrupted:
        say(f"Interrupted ({result.stopped}): {result.done} units are safe in {place}, {result.pending} are left.")
        say(f"Resume with: {_again()}")
        return INTERRUPTED
    if result.failed:
        say(f"{result.failed} units hold failures: {result.failed_cells} cells have no finite value (NaN in {place}).")
        for text in result.errors[:5]:
            say(f"  {text}")
        say("Running the same command tries them again.")
        return FAILED
    say(f"Done: {result.done} units in {place} ({result.computed} computed now).")
    return OK


@app.command
def plan(
    config: Config,
    *,
    set_: Set = None,
    calibrate: Annotated[bool, Parameter(help="Time a few forwards of the model to estimate the duration.")] = True,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print the plan as JSON.")] = False,
    allow_metric: AllowMetric = None,
    allow_pickled_weights: AllowPickledWeights = False,
) -> int:
    """Say what a sweep would compute, store and take, without running it.

    Example: ``stepscope plan configs/maze_demo.yaml --set task.mazes=100``
    """
    from pipeline.estimate import known, timed

    began = time.perf_counter()
    planned, place = bind(config, set_ or [], None, None, allowed(allow_metric, allow_pickled_weights))
    planned, found = timed(planned, time.perf_counter() - began) if calibrate else known(planned)
    cost = planned.cost()
    facts: dict[str, Any] = {
        "name": planned.config.name,
        "model": f"{planned.model.id} ({planned.model.family}, {planned.geometry.blocks} blocks)",
        "samples": len(planned.samples),
        "cells": cost.cells,
        **({"estimates": cost.estimates} if cost.estimates else {}),
        "units": cost.units,
        "row_forwards": cost.row_forwards,
        "row_forwards_naive": cost.naive_row_forwards,
        "bytes": cost.bytes,
        **_least(planned, cost),
        "store": str(place),
        "experiments": {g.experiment.name: dict(zip(g.dims, g.shape, strict=True)) for g in planned.grids},
        **found,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return OK
    for name, problems in facts.pop("looks", {}).items():
        facts[f"looks {name}"] = f"after {', '.join(map(str, problems[:-1]))} of {problems[-1]} problems"
    for name, shape in facts.pop("experiments").items():
        print(f"{name:>20}  {' x '.join(f'{d} {n}' for d, n in shape.items()) or 'one cell'}")
    for key, value in facts.items():
        print(
            f"{key.replace('_', ' '):>20}  {value:,}"
            if isinstance(value, int)
            else f"{key.replace('_', ' '):>20}  {value}"
        )
    return OK


def _least(planned: Plan, cost: Cost) -> dict[str, Any]:
    """Return what is left if every cell of the experiments in rounds stops at its first look; else all of it is."""
    if not planned.rounds:
        return {}
    return {
        "cells_least": cost.least_cells,
        "row_forwards_least": cost.least_row_forwards,
        "looks": {name: list(rounds.problems) for name, rounds in planned.rounds.items()},
    }


def bind(
    config: Path,
    overrides: list[str],
    store: str | None,
    replicas: int | None,
    permissions: Permissions = NOTHING,
) -> tuple[Plan, Location]:
    """Return the plan of a config, and where its results go."""
    from pipeline.config import load_config
    from pipeline.plan import make_plan
    from pipeline.store import locate

    place = locate(store) if store is not None else None
    if replicas is not None:
        overrides = [*overrides, f"run.replicas={replicas}"]
    loaded = load_config(config, overrides)
    planned = make_plan(loaded, config, overrides, permissions=permissions)
    return planned, place or locate(Path("runs") / f"{loaded.name}.zarr")


@contextmanager
def watched(metrics_port: int | None, metrics_host: str) -> Iterator[tuple[Observer, Callable[[int, int, int], None]]]:
    """Yield what a sweep tells its events and its size: a progress bar, and Prometheus metrics if there is a port."""
    from pipeline.observers import fan_out
    from pipeline.progress import SweepProgress

    with ExitStack() as open_:
        if metrics_port is None:
            progress = open_.enter_context(SweepProgress())
            yield fan_out(progress.observe), progress.start
            return
        from pipeline.telemetry import MetricsServer, Telemetry, TelemetryError

        telemetry = Telemetry()
        try:
            server = open_.enter_context(MetricsServer(telemetry, metrics_port, metrics_host))
        except TelemetryError as error:
            raise UsageError(str(error)) from error
        say(f"Metrics are served at {server.url}")
        progress = open_.enter_context(SweepProgress())

        def start(todo: int, total: int, cells: int) -> None:
            progress.start(todo, total, cells)
            telemetry.start(todo, total, cells)

        yield fan_out(progress.observe, telemetry.observe), start


def _again() -> str:
    import shlex

    return shlex.join(["stepscope", *sys.argv[1:]])
