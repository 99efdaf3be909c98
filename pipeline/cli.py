"""The command line: ``stepscope run | plan | check | status | effects | report | models | tasks | interventions``."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter, Token

if TYPE_CHECKING:
    from pipeline.plan import Plan

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = App(
    name="stepscope",
    help="""Find out where in a video diffusion model's computation the reasoning happens.

    Example: ``stepscope run configs/maze_demo.yaml``
    """,
    version_flags=[],
)

Config = Annotated[Path, Parameter(help="YAML file that describes the sweep.")]
StorePath = Annotated[Path, Parameter(help="Zarr store of a sweep.")]
Set = Annotated[
    list[str] | None,
    Parameter(name="--set", negative="", help="Override a setting, as key.path=value; may be repeated."),
]


def _whole(type_: Any, tokens: Sequence[Token]) -> int:
    """Convert an option to a whole number; cyclopts alone would round 1.7 without a word."""
    return int(tokens[0].value)


@app.command
def run(
    config: Config,
    *,
    store: Annotated[Path | None, Parameter(help="Where results go; default runs/NAME.zarr.")] = None,
    set_: Set = None,
    replicas: Annotated[
        int | None, Parameter(converter=_whole, help="Model replicas; 0 runs in this process without Ray.")
    ] = None,
) -> int:
    """Run a sweep, or the rest of one: the same command resumes an interrupted store.

    Replicas are Ray actors on this machine, or on the cluster named by RAY_ADDRESS.
    Exit code 0: every cell has a value; 1: some failed; 2: bad input; 130: interrupted.

    Example: ``stepscope run configs/maze_demo.yaml --store runs/demo.zarr --set sampler.steps=10``
    """
    from pipeline.progress import SweepProgress
    from pipeline.sweep import inline_executor, ray_executor, run_sweep

    plan, path = _plan(config, set_ or [], store, replicas)
    executor = inline_executor if plan.config.run.replicas == 0 else ray_executor
    with SweepProgress() as progress:
        result = run_sweep(plan, path, make_executor=executor, observe=progress.observe, on_start=progress.start)
    if result.interrupted:
        _say(f"Interrupted: {result.done} units are safe in {path}, {result.pending} are left.")
        _say(f"Resume with: {_again()}")
        return INTERRUPTED
    if result.failed:
        _say(f"{result.failed} units hold failures: {result.failed_cells} cells have no finite value (NaN in {path}).")
        for text in result.errors[:5]:
            _say(f"  {text}")
        _say("Running the same command tries them again.")
        return FAILED
    _say(f"Done: {result.done} units in {path} ({result.computed} computed now).")
    return OK


@app.command
def plan(
    config: Config,
    *,
    set_: Set = None,
    calibrate: Annotated[bool, Parameter(help="Time a few forwards of the model to estimate the duration.")] = True,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print the plan as JSON.")] = False,
) -> int:
    """Say what a sweep would compute, store and take, without running it.

    Example: ``stepscope plan configs/maze_demo.yaml --set task.mazes=100``
    """
    planned, path = _plan(config, set_ or [], None, None)
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
        "store": str(path),
        "experiments": {g.experiment.name: dict(zip(g.dims, g.shape, strict=True)) for g in planned.grids},
    }
    if calibrate:
        from pipeline.calibrate import seconds_per_row_forward

        seconds = seconds_per_row_forward(planned)
        facts["seconds_per_row_forward"] = round(seconds, 6)
        facts["estimated_seconds"] = round(cost.row_forwards * seconds / max(1, planned.config.run.replicas))
    if as_json:
        print(json.dumps(facts, indent=2))
        return OK
    for name, shape in facts.pop("experiments").items():
        print(f"{name:>20}  {' x '.join(f'{d} {n}' for d, n in shape.items()) or 'one cell'}")
    for key, value in facts.items():
        print(
            f"{key.replace('_', ' '):>20}  {value:,}"
            if isinstance(value, int)
            else f"{key.replace('_', ' '):>20}  {value}"
        )
    return OK


@app.command
def status(store: StorePath, *, as_json: Annotated[bool, Parameter(name="--json", negative="")] = False) -> int:
    """Show how much of a store is done, pending and failed.

    Example: ``stepscope status runs/maze_demo.zarr``
    """
    from pipeline.status import summarise

    rows = summarise(store)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print(f"{'group':>20} {'units':>7} {'done':>7} {'pending':>8} {'failed':>7}")
        for row in rows:
            print(f"{row['group']:>20} {row['units']:>7} {row['done']:>7} {row['pending']:>8} {row['failed']:>7}")
    return FAILED if any(row["failed"] for row in rows) else OK


@app.command
def effects(
    store: StorePath,
    *,
    replicates: Annotated[int, Parameter(converter=_whole, help="Bootstrap replicates.")] = 2000,
    seed: Annotated[int, Parameter(converter=_whole, help="Seed of the bootstrap.")] = 0,
) -> int:
    """Aggregate a store into effect maps with bootstrap intervals over prompts, written to STORE/effects.

    Example: ``stepscope effects runs/maze_demo.zarr``
    """
    from pipeline.effects import compute_effects
    from pipeline.store import open_store

    if replicates < 1 or seed < 0:
        raise UsageError(f"out of range: --replicates {replicates}, --seed {seed}. They start at 1 and 0.")
    open_store(store)
    written = compute_effects(store, unit="prompt", replicates=replicates, seed=seed)
    print(f"Wrote {', '.join(written)} to {store}/effects.")
    return OK


@app.command
def report(
    store: StorePath,
    *,
    out: Annotated[
        Path | None, Parameter(help="Folder for report.html and its PNGs; default STORE with suffix _report.")
    ] = None,
) -> int:
    """Draw a store's effects as one HTML page that opens offline, and as PNG files.

    Example: ``stepscope report runs/maze_demo.zarr --out runs/demo_report``
    """
    from pipeline.report import write_report
    from pipeline.store import open_store

    open_store(store)
    if not (store / "effects").exists():
        raise UsageError(f"{store} has no effects yet. Run first: stepscope effects {store}")
    page = write_report(store, out or store.with_name(store.stem + "_report"))
    print(f"Wrote {page}.")
    return OK


@app.command
def check(
    model: Annotated[str, Parameter(help="Embedded model, diffusers folder or hub name.")],
    *,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Parameter(help="Precision.")] = "float32",
    device: Annotated[Literal["auto", "cpu", "cuda"], Parameter(help="Where it runs.")] = "auto",
) -> int:
    """Prove on a model's smallest run that sites, edits and replays do exactly what they say.

    Exit code 0: every control passed; 1: one failed; 2: bad input.

    Example: ``stepscope check embedded:maze``
    """
    from pipeline.check import as_rows, check_model

    checked = check_model(model, dtype=dtype, device=device)
    print(f"{model}: {checked.pipeline}, family {checked.family.name}, {checked.solver}")
    print(f"{'guidance':>8}  {'control':<46} difference of limit")
    for guided, name, outcome in as_rows(checked):
        print(f"{guided:>8}  {name:<46} {outcome}")
    if checked.family.notes:
        print(f"Note: {checked.family.notes}")
    return OK if checked.passed else FAILED


@app.command
def models() -> int:
    """List the embedded models and the model families, with their pipelines and sites.

    Example: ``stepscope models``
    """
    from pipeline import listing

    return _print(listing.models())


@app.command
def tasks() -> int:
    """List the tasks with their settings, and the metrics.

    Example: ``stepscope tasks``
    """
    from pipeline import config as _config  # noqa: F401  (registers tasks and metrics)
    from pipeline import listing

    return _print(listing.tasks())


@app.command
def interventions(
    kind: Annotated[str | None, Parameter(help="One kind, with its settings and a YAML example.")] = None,
) -> int:
    """List the intervention kinds with their formulas, or one with its settings and an example.

    Example: ``stepscope interventions patch``
    """
    from pipeline import listing

    try:
        return _print(listing.interventions(kind))
    except listing.UnknownKindError as error:
        raise UsageError(str(error)) from error


def _print(lines: Iterable[str]) -> int:
    for line in lines:
        print(line)
    return OK


class UsageError(ValueError):
    """A command that cannot run as given."""


def _plan(config: Path, overrides: list[str], store: Path | None, replicas: int | None) -> tuple[Plan, Path]:
    from pipeline.config import load_config
    from pipeline.plan import make_plan

    if replicas is not None:
        overrides = [*overrides, f"run.replicas={replicas}"]
    loaded = load_config(config, overrides)
    return make_plan(loaded, config, overrides), store or Path("runs") / f"{loaded.name}.zarr"


def _again() -> str:
    import shlex

    return shlex.join(["stepscope", *sys.argv[1:]])


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _bad_input() -> tuple[type[Exception], ...]:
    from cluster import PoolError
    from interventions.controls import ControlError
    from pipeline.config import ConfigError
    from pipeline.models import ModelError
    from pipeline.store import StoreError

    return ConfigError, ControlError, ModelError, StoreError, PoolError, UsageError


_NOT_WRITABLE = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors of the user are one message, never a traceback."""
    try:
        command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _say(f"stepscope: {' '.join(str(error).split())}")
        return BAD_INPUT
    call: Callable[..., Any] = command
    try:
        code = call(*bound.args, **bound.kwargs)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough; Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        _say("Interrupted.")
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, _bad_input()):
            _say(f"stepscope: {error}")
            return BAD_INPUT
        if isinstance(error, _NOT_WRITABLE):
            _say(f"stepscope: {error.filename or 'a file'}: {error.strerror}. Choose a path that can be written.")
            return BAD_INPUT
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _say("stepscope: the disk is full. Finished units are safe; free space and run the same command again.")
            return BAD_INPUT
        raise
    return code if isinstance(code, int) else OK


def console() -> None:
    """Entry point of the ``stepscope`` script."""
    sys.exit(main())


if __name__ == "__main__":
    console()
