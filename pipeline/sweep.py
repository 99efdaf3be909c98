"""The sweep: hand pending units to an executor, keep status and journal, survive interruption, resume."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster import Executor, InlinePool, PoolError, PoolOptions, WorkUnit
from cluster.events import Event, ReplicaLost, UnitDone, UnitFailed, UnitRetried
from pipeline.outcomes import outcome
from pipeline.plan import BASELINE, Plan, Unit
from pipeline.redaction import redact
from pipeline.screening import mean_over_samples, select
from pipeline.store import DONE, FAILED, PENDING, DriverLock, Journal, Store, consolidate, open_or_create

FLUSH_SECONDS = 2.0
"""How often the driver writes status; units finished since then are recovered from the journal."""


@dataclass(slots=True, kw_only=True)
class SweepResult:
    """What a call of ``run_sweep`` did and what the store holds now.

    Attributes
    ----------
    done, failed, pending : units of the whole store. computed : units finished by this call.
    failed_cells : cells without a finite value, over the whole store as far as this call and the journal know.
    unscreened : samples whose baseline raised, so that they have no estimates either.
    errors : one message for each unit that failed for good.
    """

    done: int = 0
    failed: int = 0
    pending: int = 0
    computed: int = 0
    failed_cells: int = 0
    interrupted: bool = False
    unscreened: int = 0
    errors: list[str] = field(default_factory=list)


class Ledger:
    """Status of every unit: read from status arrays and journal, written back by the driver alone."""

    def __init__(self, store: Store, plan: Plan) -> None:
        self.store = store
        self.groups = (BASELINE, *plan.by_name)
        self.status: dict[str, NDArray[np.uint8]] = {g: store.status(g) for g in self.groups}
        self.failed_cells: dict[tuple[str, int], int] = {}
        self._dirty: set[str] = set()
        self._flushed = time.monotonic()
        self._recover(Journal(store.path))

    def _recover(self, journal: Journal) -> None:
        for ended in map(outcome, journal.entries()):
            if ended is not None and ended.group in self.status and ended.index < len(self.status[ended.group]):
                self.mark(ended.group, ended.index, FAILED if ended.failed else DONE, ended.failed_cells)

    def mark(self, group: str, index: int, status: int, failed_cells: int = 0) -> None:
        """Set one unit's status."""
        if self.status[group][index] != status:
            self.status[group][index] = status
            self._dirty.add(group)
        self.failed_cells[group, index] = failed_cells

    def pending(self, unit: Unit) -> bool:
        """Whether a unit still has to run; failed units are tried again by a new call."""
        return bool(self.status[unit.group][unit.index] != DONE)

    def count(self, status: int) -> int:
        """Count units with a status."""
        return sum(int((s == status).sum()) for s in self.status.values())

    def flush(self, *, force: bool = False) -> None:
        """Write changed status arrays, at most every ``FLUSH_SECONDS`` unless forced."""
        if not force and time.monotonic() - self._flushed < FLUSH_SECONDS:
            return
        for group in sorted(self._dirty):
            self.store.write_status(group, self.status[group])
        self._dirty.clear()
        self._flushed = time.monotonic()


Observer = Callable[[Event, Unit | None], None]


def run_sweep(
    plan: Plan,
    path: Path,
    *,
    make_executor: Callable[[Plan, Path], Executor] | None = None,
    observe: Observer | None = None,
    on_start: Callable[[int, int, int], None] | None = None,
) -> SweepResult:
    """Run every unit of a plan that the store does not hold yet.

    Parameters
    ----------
    make_executor : builds the pool once the store exists; the default runs in this process.
    observe : called with every event and its unit. on_start : called with units to run, units in all,
        and cells to run.

    Raises
    ------
    StoreError : see ``open_or_create``; also if another process drives the store.
    """
    store = open_or_create(path, plan)
    lock = DriverLock(path)
    lock.acquire()
    try:
        store.sweep_partial_files()
        ledger, journal = Ledger(store, plan), Journal(path)
        todo = [unit for unit in plan.units() if ledger.pending(unit)]
        cells = functools.partial(_cells_of, store, plan)
        if on_start is not None:
            on_start(len(todo), sum(len(s) for s in ledger.status.values()), sum(map(cells, todo)))
        result = SweepResult()
        if todo:
            executor = (make_executor or inline_executor)(plan, path)
            try:
                for units in _phases(todo, plan):
                    if units and _may_start(store, plan, units, result):
                        _drive(executor, units, ledger, journal, result, observe, cells)
            finally:
                ledger.flush(force=True)
                executor.close()
        ledger.flush(force=True)
        judged = not result.interrupted and _judge(path, plan, again=bool(todo))
        if todo or judged:
            consolidate(path)
        return _summarise(result, ledger)
    finally:
        lock.release()


def _cells_of(store: Store, plan: Plan, unit: Unit) -> int:
    chosen = store.chosen(unit.group, unit.start, unit.stop) if plan.verifies(unit) else None
    return plan.unit_cells(unit) if chosen is None else int(chosen.sum())


def _phases(todo: list[Unit], plan: Plan) -> tuple[list[Unit], list[Unit]]:
    """Part units in those that verify chosen cells and those that come before, as every sample is screened first."""
    return [u for u in todo if not plan.verifies(u)], [u for u in todo if plan.verifies(u)]


def _may_start(store: Store, plan: Plan, units: list[Unit], result: SweepResult) -> bool:
    """Whether these units can run now; before the first that verify, the cells are chosen from what is stored."""
    if result.interrupted or not plan.verifies(units[0]):
        return not result.interrupted
    for grid in plan.screened:
        name, settings = grid.experiment.name, grid.experiment.screen
        assert settings is not None
        if store.chosen(name, 0, grid.shape[0] if grid.shape else 1) is None:
            if result.unscreened:
                # Chosen without them, the cells would depend on what happened to fail.
                result.errors.append(f"{name}: cells are verified once {result.unscreened} more samples are screened")
                return False
            store.write_selection(name, select(mean_over_samples(store.estimates(name)), settings))
    return True


def _judge(path: Path, plan: Plan, *, again: bool) -> bool:
    """Compare estimates and verified effects of every screened experiment in its attributes; return whether it did."""
    if not plan.screened:
        return False
    from pipeline.effects.agreement import write_agreement

    return sum(write_agreement(path, grid.experiment.name, again=again) for grid in plan.screened) > 0


def _drive(
    executor: Executor,
    todo: list[Unit],
    ledger: Ledger,
    journal: Journal,
    result: SweepResult,
    observe: Observer | None,
    cells: Callable[[Unit], int],
) -> None:
    units = {unit.id: unit for unit in todo}

    def on_event(event: Event) -> None:
        unit = units.get(getattr(event, "unit", -1))
        if isinstance(event, UnitDone) and unit is not None:
            receipt = event.receipt.as_dict()
            journal.append(
                unit=unit.id,
                group=unit.group,
                index=unit.index,
                replica=event.replica,
                attempt=event.attempt,
                **receipt,
            )
            ledger.mark(unit.group, unit.index, FAILED if receipt["failed"] else DONE, receipt["failed"])
            result.computed += 1
        elif isinstance(event, UnitFailed) and unit is not None:
            journal.append(
                unit=unit.id,
                group=unit.group,
                index=unit.index,
                attempts=event.attempts,
                error=redact(event.error),
                failed=cells(unit),
            )
            ledger.mark(unit.group, unit.index, FAILED, cells(unit))
            result.unscreened += unit.group == BASELINE
            result.errors.append(f"unit {unit.id} ({unit.group}, sample {unit.sample}): {event.error}")
        elif isinstance(event, UnitRetried | ReplicaLost):
            journal.append(unit=getattr(event, "unit", None), replica=event.replica, retried=redact(event.error))
        ledger.flush()
        if observe is not None:
            observe(event, unit)

    with _terminate_as_interrupt():
        try:
            executor.run((WorkUnit(id=u.id, locality=u.sample, payload=u) for u in todo), on_event)
        except KeyboardInterrupt:
            result.interrupted = True


def _summarise(result: SweepResult, ledger: Ledger) -> SweepResult:
    result.done, result.failed, result.pending = (ledger.count(s) for s in (DONE, FAILED, PENDING))
    result.failed_cells = sum(ledger.failed_cells.values())
    return result


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that a preempted sweep leaves a flushed, resumable store."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def pool_options(plan: Plan) -> PoolOptions:
    """Return the pool options that a config asks for."""
    run = plan.config.run
    return PoolOptions(
        replicas=max(1, run.replicas),
        cpus_per_replica=run.cpus_per_replica,
        gpus_per_replica=run.gpus_per_replica,
        max_attempts=run.max_attempts,
    )


def _factory(plan: Plan, path: Path) -> Callable[[], Any]:
    from pipeline.replica import Replica

    return functools.partial(Replica, plan.config.model_dump(mode="json"), str(path.resolve()), plan.permissions)


def inline_executor(plan: Plan, path: Path) -> Executor:
    """Run units in this process, without Ray."""
    return InlinePool(_factory(plan, path), pool_options(plan))


def ray_executor(plan: Plan, path: Path) -> Executor:
    """Run units on Ray actors: the cluster at ``RAY_ADDRESS`` if that is set, else a local one started here."""
    import logging
    import os

    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # Replicas inherit these: glibc would otherwise give every forward's buffers back to the system.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000000")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "2000000000")
    import ray

    from cluster.pool import RayPool

    if not ray.is_initialized():
        if address := os.environ.get("RAY_ADDRESS"):
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                raise PoolError(
                    f"no Ray cluster answers at RAY_ADDRESS={address}: {error}. "
                    "Start it, or unset RAY_ADDRESS to run on this machine."
                ) from error
        else:
            run = plan.config.run
            ray.init(
                address="local",
                num_cpus=max(1, round(run.replicas * run.cpus_per_replica)),
                object_store_memory=100 * 2**20,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    return RayPool(_factory(plan, path), pool_options(plan))
