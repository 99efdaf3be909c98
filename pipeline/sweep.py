"""The sweep: hand pending units to an executor, keep status and journal, survive interruption, resume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from cluster import Executor, WorkUnit
from cluster.events import Event, ReplicaLost, UnitDone, UnitFailed, UnitRetried
from pipeline.executors import MakeExecutor, inline_executor
from pipeline.layout import BASELINE, Unit
from pipeline.ledger import Ledger
from pipeline.plan import Plan
from pipeline.redaction import redact
from pipeline.rounds import make_look, skipped
from pipeline.screening import mean_over_samples, select
from pipeline.stopping import Stopping
from pipeline.store import (
    DONE,
    FAILED,
    PENDING,
    Journal,
    Lease,
    Place,
    Store,
    StoreError,
    consolidate,
    locate,
    open_or_create,
)

ERRORS_KEPT = 100
"""Messages of failed units that a result holds; the journal has them all."""

Observer = Callable[[Event, Unit | None], None]


def _silent(text: str) -> None:
    """Tell nobody."""


@dataclass(slots=True, kw_only=True)
class SweepResult:
    """What a call of ``run_sweep`` did and what the store holds now.

    Attributes
    ----------
    done, failed, pending : units of the whole store. computed : units finished by this call.
    failed_cells : cells without a finite value, over the whole store as far as this call and the journal know.
    stopped : why the sweep ended before its last unit, if it did.
    unscreened : samples whose baseline raised, so that they have no estimates either.
    errors : one message for each unit that failed for good, the first hundred of them.
    """

    done: int = 0
    failed: int = 0
    pending: int = 0
    computed: int = 0
    failed_cells: int = 0
    stopped: str | None = None
    unscreened: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def interrupted(self) -> bool:
        """Whether the sweep was told to stop before its end."""
        return self.stopped is not None


def run_sweep(
    plan: Plan,
    place: Place,
    *,
    make_executor: MakeExecutor = inline_executor,
    observe: Observer | None = None,
    on_start: Callable[[int, int, int], None] | None = None,
    say: Callable[[str], None] = _silent,
) -> SweepResult:
    """Run every unit of a plan that the store does not hold yet.

    Parameters
    ----------
    make_executor : builds the pool once the store exists; the default runs in this process.
    observe : called with every event and its unit. on_start : called with units to run, units in all,
        and cells to run. say : told about earlier drivers, repairs and reasons to stop.

    Raises
    ------
    StoreError : see ``open_or_create``; also if another process drives the store, or it cannot be written any more.
    PoolError : see ``cluster``; everything that was finished before is safe.
    """
    location = locate(place)
    store = open_or_create(location, plan, say=say)
    lease = Lease(location, say=say)
    lease.acquire()
    journal = Journal(location, lease.generation, lease.check)
    try:
        store.sweep_partial_files()
        ledger = Ledger(store, plan, journal, lease)
        stopping = Stopping(location, lease.generation, plan.config.run.notices)
        drive = _Drive(plan, store, ledger, journal, stopping, observe)
        units, cells = ledger.todo()
        if on_start is not None:
            on_start(units, len(ledger), cells)
        if units:
            # Made first, as connecting to Ray sets a handler of its own for SIGTERM.
            executor = make_executor(plan, location)
            with stopping.on_signals(plan.config.run.drain_s, say):
                drive.all(executor)
        ledger.flush(force=True)
        if not drive.result.interrupted:
            # A selection that was damaged is chosen again, though no unit waits for it.
            drive.choose_again()
        if drive.lost:
            store.sweep_partial_files()
        judged = not drive.result.interrupted and _judge(location, plan, again=bool(units))
        if units or judged:
            consolidate(location)
        return _summarise(drive.result, ledger)
    finally:
        try:
            journal.close()
        finally:
            lease.release()


class _Drive:
    """One call of ``run_sweep`` while it hands out units: what it does with every event.

    Attributes
    ----------
    lost : replicas that died, maybe in the middle of a write.
    held : experiments whose next round waits for a unit that raised.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        ledger: Ledger,
        journal: Journal,
        stopping: Stopping,
        observe: Observer | None,
    ) -> None:
        self.result, self.lost = SweepResult(), 0
        self.held: set[str] = set()
        self._raised: Counter[str] = Counter()
        self._plan, self._store, self._ledger, self._journal = plan, store, ledger, journal
        self._stopping, self._observe = stopping, observe

    def all(self, executor: Executor) -> None:
        """Run what is pending: round by round, then what verifies, as every sample is screened before."""
        try:
            for numbers in self._plan.layout.phases:
                if self._may_start(numbers):
                    self._some(executor, numbers)
            self._ledger.flush(force=True)
        except BaseException:
            # Whatever ends the sweep, units that are done should not run again; it may be the storage that fails.
            with suppress(OSError, StoreError):
                self._ledger.flush(force=True)
            raise
        finally:
            executor.close()

    def _some(self, executor: Executor, numbers: range) -> None:
        units = (
            WorkUnit(id=unit.id, locality=unit.sample, payload=unit, weight=self._weight(unit))
            for unit in self.due(numbers)
        )
        try:
            finished = executor.run(units, self._on_event, self._stop)
        except KeyboardInterrupt:
            self.result.stopped = self._stopping.reason or "Ctrl-C"
        else:
            self.result.stopped = None if finished else self._stopping() or "it was told to"

    def _stop(self) -> str | None:
        # Units may take hours: what is done is told, and a lease that is lost is noticed, between two events too.
        self._ledger.flush()
        return self._stopping()

    def due(self, numbers: range) -> Iterator[Unit]:
        """Yield the units of some numbers that have to run and may."""
        return (unit for unit in self._ledger.pending(numbers) if unit.group not in self.held)

    def _weight(self, unit: Unit) -> float:
        weight = self._plan.unit_forwards(unit)
        if unit.group not in self._plan.rounds:
            return weight
        return weight * self._ledger.cells(unit) / self._plan.unit_cells(unit)

    def _may_start(self, numbers: range) -> bool:
        """Whether these units can run now; before that, cells are chosen or stopped from what is stored."""
        if self.result.interrupted or next(self._ledger.pending(numbers), None) is None:
            return False
        if numbers == self._plan.layout.verifying:
            return all(self._choose(name) for name in self._screened())
        sample = self._plan.layout.unit(numbers.start).sample
        for name, rounds in self._plan.rounds.items():
            self._look_until(name, rounds.round_of(sample))
        if self._plan.rounds:
            self._skip(numbers)
        return next(self.due(numbers), None) is not None

    def choose_again(self) -> None:
        """Choose what is open, if every unit that it is chosen from is done."""
        for name, rounds in self._plan.rounds.items():
            self._look_until(name, rounds.looks - 1)
        if next(self._ledger.pending(self._plan.layout.verifying), None) is None:
            for name in self._screened():
                self._choose(name)

    def _look_until(self, name: str, round_: int) -> None:
        """Make the looks before a round of an experiment, unless they are made; hold it if that is not possible yet."""
        for look in range(round_):
            if name in self.held or self._store.stopped(name, look) is not None:
                continue
            if raised := self._raised[BASELINE] + self._raised[name]:
                # Without them, which cells stop would depend on what happened to fail.
                self.held.add(name)
                self.result.errors.append(f"{name}: round {look + 2} begins once {raised} more units are computed")
                continue
            # Nobody but the holder of the lease may look.
            self._ledger.flush(force=True)
            make_look(self._plan, self._store, name, look)

    def _skip(self, numbers: range) -> None:
        """Mark units as done whose cells have all stopped: nothing is computed and nothing stored."""
        for unit in self.due(numbers):
            if unit.group in self._plan.rounds and not self._ledger.cells(unit):
                self._journal.append(unit=unit.id, group=unit.group, index=unit.index, skipped=True, cells=0, failed=0)
                self._ledger.done(unit, 0)
                if self._observe is not None:
                    self._observe(skipped(unit), unit)

    def _screened(self) -> Iterator[str]:
        return (grid.experiment.name for grid in self._plan.screened)

    def _choose(self, name: str) -> bool:
        """Choose the cells of a screened experiment that are verified, unless they are chosen."""
        settings = self._plan.by_name[name].experiment.screen
        assert settings is not None
        if self._store.chosen(name, 0, self._plan.layout.windows(name).extent) is not None:
            return True
        if self.result.unscreened:
            # Chosen without them, the cells would depend on what happened to fail.
            text = f"{name}: cells are verified once {self.result.unscreened} more samples are screened"
            self.result.errors.append(text)
            return False
        # Nobody but the holder of the lease may choose.
        self._ledger.flush(force=True)
        self._store.write_selection(name, select(mean_over_samples(self._store.estimates(name)), settings))
        return True

    def _on_event(self, event: Event) -> None:
        number = getattr(event, "unit", None)
        unit = self._plan.layout.unit(number) if number is not None else None
        if isinstance(event, UnitDone) and unit is not None:
            self._done(event, unit)
        elif isinstance(event, UnitFailed) and unit is not None:
            self._failed(event, unit)
        elif isinstance(event, UnitRetried | ReplicaLost):
            self.lost += isinstance(event, ReplicaLost)
            self._journal.append(unit=number, replica=event.replica, retried=redact(event.error))
        self._ledger.flush()
        if self._observe is not None:
            self._observe(event, unit)

    def _done(self, event: UnitDone, unit: Unit) -> None:
        receipt = event.receipt.as_dict()
        self._journal.append(
            unit=unit.id, group=unit.group, index=unit.index, replica=event.replica, attempt=event.attempt, **receipt
        )
        self._ledger.done(unit, receipt["failed"])
        self.result.computed += 1

    def _failed(self, event: UnitFailed, unit: Unit) -> None:
        self._journal.append(
            unit=unit.id,
            group=unit.group,
            index=unit.index,
            attempts=event.attempts,
            error=redact(event.error),
            failed=self._ledger.cells(unit),
        )
        self._ledger.failed(unit)
        self.result.unscreened += unit.group == BASELINE
        self._raised[unit.group] += 1
        if len(self.result.errors) < ERRORS_KEPT:
            self.result.errors.append(f"unit {unit.id} ({unit.group}, sample {unit.sample}): {event.error}")


def _judge(place: Place, plan: Plan, *, again: bool) -> bool:
    """Compare estimates and verified effects of every screened experiment in its attributes; return whether it did."""
    if not plan.screened:
        return False
    from pipeline.effects.agreement import write_agreement

    return sum(write_agreement(place, grid.experiment.name, again=again) for grid in plan.screened) > 0


def _summarise(result: SweepResult, ledger: Ledger) -> SweepResult:
    result.done, result.failed, result.pending = (ledger.count(s) for s in (DONE, FAILED, PENDING))
    result.failed_cells = ledger.failed_cells
    return result
