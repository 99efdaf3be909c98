"""A replica without a model: writes the regions of a real plan with values that are a function of coordinates alone.

It honours the contract of ``pipeline.replica.Replica``, so drivers, pools and stores meet the real thing, in
milliseconds a unit. It can be told to die, raise or return NaN at the attempts that a table names.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.layout import BASELINE, Unit
from pipeline.screening import ESTIMATE

if TYPE_CHECKING:
    from pipeline.plan import Plan
    from pipeline.store import Place

DEATHS = ("die before write", "die between chunks", "die after write", "die leaving a partial file")
FAULTS = (*DEATHS, "raise", "nan", "hang")
"""What can happen at an attempt; deaths are by SIGKILL and take the whole process along."""
HANGS_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What the driver learns of a finished unit: the fields of ``pipeline.replica.Receipt``, which loads torch."""

    cells: int
    failed: int
    bytes: int
    row_forwards: int
    seconds: float
    digest: str = ""
    gpu_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a replica must know of a plan, without the plan.

    Attributes
    ----------
    cells : shape of an experiment's grid. baseline : shape of one sample of each array of the baseline.
    screened : experiments that have estimates. rounds : where the rounds of experiments end, in samples.
    previews : position of each sample that has one. preview : its shape.
    """

    config_hash: str
    metrics: tuple[str, ...]
    cells: Mapping[str, tuple[int, ...]]
    baseline: Mapping[str, tuple[int, ...]]
    screened: tuple[str, ...] = ()
    rounds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    previews: Mapping[int, int] = field(default_factory=dict)
    preview: tuple[int, ...] = ()


def shapes_of(plan: Plan) -> Shapes:
    """Return what a synthetic replica must know of a plan."""
    metrics = tuple(metric.name for metric in plan.metrics)
    steps, frames = plan.geometry.steps, plan.geometry.frames
    return Shapes(
        config_hash=plan.config.hash(),
        metrics=metrics,
        cells={name: tuple(grid.shape) for name, grid in plan.by_name.items()},
        baseline={**dict.fromkeys(metrics, (2,)), **{f"{name}_by_step": (2, steps) for name in metrics}},
        screened=tuple(grid.experiment.name for grid in plan.screened),
        rounds={name: rounds.samples for name, rounds in plan.rounds.items()},
        previews={sample: position for position, sample in enumerate(plan.config.previews.samples)},
        preview=(3, steps, frames, *plan.task.preview_size(), 3),
    )


@dataclass(frozen=True, kw_only=True)
class Script:
    """What goes wrong, and where that is counted.

    Attributes
    ----------
    folder : beside the store; holds a file a unit whose length is its attempts, and a file a living replica.
    faults : by unit and attempt, counted over all processes. unit_s : seconds that a unit takes.
    """

    folder: Path
    faults: Mapping[tuple[int, int], str] = field(default_factory=dict)
    unit_s: float = 0.0

    def enter(self) -> None:
        """Note that this process holds a replica."""
        (self.folder / "replicas").mkdir(parents=True, exist_ok=True)
        (self.folder / "replicas" / str(os.getpid())).touch()

    def fault_of(self, unit: int) -> str | None:
        """Count an attempt at a unit and return what goes wrong in it."""
        if all(named != unit for named, _ in self.faults):
            return None
        (self.folder / "attempts").mkdir(parents=True, exist_ok=True)
        with (self.folder / "attempts" / str(unit)).open("ab") as file:
            file.write(b".")
            attempt = file.tell()
        return self.faults.get((unit, attempt))


def sample_values(group: str, name: str, sample: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the values of one sample of an array: a function of the array's path, the sample and each cell's index."""
    return _generator(group, name, sample).standard_normal(shape).astype(np.float32)


def preview_values(sample: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the film of a sample."""
    return _generator("previews", "x0_hat", sample).integers(0, 256, shape, dtype=np.uint8)


def _generator(group: str, name: str, sample: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{group}/{name}/{sample}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


class SyntheticReplica:
    """A worker of the pool that computes nothing.

    Parameters
    ----------
    store : address of the store. script : what goes wrong.
    alone : whether the process does nothing else, so that it need not load what a driver needs.
    """

    hardware = "synthetic"

    def __init__(self, shapes: Shapes, store: str, script: Script | None = None, *, alone: bool = False) -> None:
        if alone:
            _without_planning()
        from pipeline.store.accounts import digest_of
        from pipeline.store.regions import Store

        self.shapes, self.script, self._digest_of = shapes, script, digest_of
        self.store = Store(store)
        if self.store.config_hash != shapes.config_hash:
            raise ValueError(f"store {store} holds another config than this replica was built for.")
        if script is not None:
            script.enter()

    def run(self, unit: Unit) -> Receipt:
        """Write one unit's regions; the same unit always writes the same bytes."""
        started = time.perf_counter()
        fault = self.script.fault_of(unit.id) if self.script is not None else None
        if self.script is not None and self.script.unit_s:
            time.sleep(self.script.unit_s)
        match fault:
            case "raise":
                raise RuntimeError(f"planted failure of unit {unit.id}")
            case "hang":
                time.sleep(HANGS_S)
        writes, receipt = self.prepare(unit, spoiled=fault == "nan" and unit.group != BASELINE)
        self._write(writes, fault)
        return replace(receipt, seconds=round(time.perf_counter() - started, 4))

    def prepare(self, unit: Unit, *, spoiled: bool = False) -> tuple[list[Write], Receipt]:
        """Return what is to be written of a unit, array by array, and the receipt for all of it.

        Parameters
        ----------
        spoiled : one cell has no value.
        """
        writes, counts = (self._baseline if unit.group == BASELINE else self._cells)(unit, spoiled=spoiled)
        values = {f"{group}/{name}": value for group, name, value, _ in writes}
        written = sum(value.nbytes for value in values.values())
        return writes, Receipt(**counts, bytes=written, row_forwards=0, seconds=0.0, digest=self._digest_of(values))

    def _write(self, writes: list[Write], fault: str | None) -> None:
        for position, (_, _, _, write) in enumerate(writes):
            if (fault, position) in (("die before write", 0), ("die between chunks", 1)):
                die()
            if (fault, position) == ("die leaving a partial file", 0):
                (self.store.location.path / BASELINE / f"leftover.{os.getpid()}.partial").write_bytes(b"torn")
                die()
            write()
        if fault in DEATHS:
            die()

    def _baseline(self, unit: Unit, *, spoiled: bool) -> tuple[list[Write], dict[str, int]]:
        shapes, sample = self.shapes, unit.sample
        values: list[tuple[str, str, NDArray[Any], int]] = [
            (BASELINE, name, sample_values(BASELINE, name, sample, shape), sample)
            for name, shape in shapes.baseline.items()
        ]
        if spoiled:
            values[0][2][0] = np.nan
        values += [
            (name, ESTIMATE, sample_values(name, ESTIMATE, sample, shapes.cells[name]), sample)
            for name in shapes.screened
        ]
        if sample in shapes.previews:
            values.append(("previews", "x0_hat", preview_values(sample, shapes.preview), shapes.previews[sample]))
        writes = [
            (group, name, value, functools.partial(self.store.write_sample, group, {name: value}, position))
            for group, name, value, position in values
        ]
        return writes, {"cells": 2, "failed": int(spoiled)}

    def _cells(self, unit: Unit, *, spoiled: bool) -> tuple[list[Write], dict[str, int]]:
        shape = self.shapes.cells[unit.group]
        chosen = self._chosen(unit)
        writes = []
        for name in self.shapes.metrics:
            whole = sample_values(unit.group, name, unit.sample, shape)
            value = (whole[unit.start : unit.stop] if shape else whole).copy()
            flat = value.reshape(-1)
            flat[~chosen[: flat.size] if chosen is not None else slice(0, 0)] = np.nan
            if spoiled:
                flat[np.flatnonzero(np.isfinite(flat))[:1]] = np.nan
            where = (unit.sample, unit.start, unit.stop)
            write = functools.partial(self.store.write_cells, unit.group, {name: value}, *where)
            writes.append((unit.group, name, value, write))
        cells = int(chosen.sum()) if chosen is not None else writes[0][2].size
        return writes, {"cells": cells, "failed": int(spoiled and cells > 0)}

    def _chosen(self, unit: Unit) -> NDArray[np.bool_] | None:
        if round_ := bisect.bisect_right(self.shapes.rounds.get(unit.group, ()), unit.sample):
            stopped = self.store.stopped(unit.group, round_ - 1, unit.start, unit.stop)
            if stopped is None:
                raise ValueError(f"round {round_ + 1} of {unit.group} has not begun.")
            return ~stopped.ravel()
        if unit.group not in self.shapes.screened:
            return None
        chosen = self.store.chosen(unit.group, unit.start, unit.stop)
        if chosen is None:
            raise ValueError(f"the cells of {unit.group} to verify are not chosen yet.")
        return chosen


Write = tuple[str, str, NDArray[Any], Callable[[], Any]]


def die() -> None:
    """End this process as the system would."""
    os.kill(os.getpid(), signal.SIGKILL)


def synthetic_factory(plan: Plan, place: Place, script: Script | None = None, *, alone: bool = False) -> Any:
    """Return the factory of a pool of synthetic replicas."""
    from pipeline.store import locate

    return functools.partial(SyntheticReplica, shapes_of(plan), locate(place).address, script, alone=alone)


def _without_planning() -> None:
    """Let modules of the store be imported one by one: the package as a whole plans, and loads torch for it."""
    spec = find_spec("pipeline")
    if "pipeline.store" not in sys.modules and spec is not None and spec.submodule_search_locations:
        package = types.ModuleType("pipeline.store")
        package.__path__ = [str(Path(spec.submodule_search_locations[0]) / "store")]
        sys.modules["pipeline.store"] = package
