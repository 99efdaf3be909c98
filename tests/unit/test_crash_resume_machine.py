"""The state machine of crashes finds nothing in the code as it is, and each mistake that is planted in it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

import pipeline.store.journal
from pipeline.layout import Unit
from pipeline.ledger import Ledger
from pipeline.store import PENDING, Journal, Lease, Store
from tests.crash_machine import BucketMachine, CrashMachine

verification: Any = importlib.import_module("pipeline.store.verify")

COMMON = {
    "a process is refused",
    "the lease is taken over",
    "a deposed driver is told so",
    "a process is killed",
    "a driver ends in the middle",
    "pending to done",
    "pending to failed",
    "failed to done",
    "done to pending",
    "units found bad",
    "status or selection rebuilt",
    "a late replica writes a unit that is done",
}
"""What must have happened in the examples, or they show nothing."""


def examples(number: int) -> settings:
    # Shrinking takes minutes here: to understand a failure, add Phase.shrink for a while.
    return settings(
        max_examples=number,
        stateful_step_count=50,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize(
    ("machine", "number", "more"),
    [
        pytest.param(CrashMachine, 40, {"the last line is torn"}, id="folder"),
        pytest.param(BucketMachine, 15, set(), id="bucket"),
    ],
)
def test_whatever_happens_a_resumed_sweep_ends_as_an_undisturbed_one(machine, number, more):
    machine.seen.clear()
    run_state_machine_as_test(machine, settings=examples(number))
    print(dict(machine.seen))
    assert COMMON | more <= {event for event, times in machine.seen.items() if times}


def status_before_data(patch: pytest.MonkeyPatch) -> None:
    pending = Ledger.pending

    def hasty(self: Ledger, numbers: Iterable[int]) -> Iterator[Unit]:
        for unit in pending(self, numbers):
            self.done(unit, 0)
            yield unit

    patch.setattr(Ledger, "pending", hasty)


def lease_is_not_checked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lease, "check", lambda self: None)


def lines_need_no_lease(patch: pytest.MonkeyPatch) -> None:
    append = Journal._append_to_file

    def hasty(self: Journal, line: bytes) -> None:
        self._check = lambda: None
        append(self, line)

    patch.setattr(Journal, "_append_to_file", hasty)


def the_living_are_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lease, "_await_death", lambda self, claim: None)


def the_silent_are_never_followed(patch: pytest.MonkeyPatch) -> None:
    def refuse(self: Lease, claim: Any) -> None:
        raise self._refusal(claim)

    patch.setattr(Lease, "_await_death", refuse)


def the_journal_is_not_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "_recover", lambda self: None)


def lines_are_glued_to_torn_ones(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pipeline.store.journal, "_ends_torn", lambda path: False)


def failed_cells_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    done = Ledger.done
    patch.setattr(Ledger, "done", lambda self, unit, failed: done(self, unit, 0))


def failed_units_are_left(patch: pytest.MonkeyPatch) -> None:
    pending = Ledger.pending

    def only_new(self: Ledger, numbers: Iterable[int]) -> Iterator[Unit]:
        return (unit for unit in pending(self, numbers) if self._status[unit.group][unit.index] == PENDING)

    patch.setattr(Ledger, "pending", only_new)


def partial_files_are_left(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Store, "sweep_partial_files", lambda self: 0)


def checksums_are_not_minded(patch: pytest.MonkeyPatch) -> None:
    judge = verification._Verification._judge

    def lenient(self: Any, *given: Any) -> str:
        cause: str = judge(self, *given)
        return "" if cause == verification.UNREADABLE else cause

    patch.setattr(verification._Verification, "_judge", lenient)


def digests_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    take = verification.Receipts.take
    patch.setattr(verification.Receipts, "take", lambda self, *given: [take(self, *given), self.known.fill(False)])


def digests_differ(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verification, "digest_of", lambda values: "0" * 32)


def lines_wait_for_status(patch: pytest.MonkeyPatch) -> None:
    """Only a bucket has lines that are not safe yet."""
    flush = Ledger.flush

    def hasty(self: Ledger, *, force: bool = False) -> None:
        self._journal, journal = _Lazy(), self._journal  # type: ignore[assignment]
        flush(self, force=force)
        self._journal = journal

    patch.setattr(Ledger, "flush", hasty)


class _Lazy:
    def flush(self) -> None:
        """Put it off."""


LOST_LEASE = "units that changed|holds the store|knows otherwise"
MISTAKES = [
    (CrashMachine, status_before_data, "cannot be resumed|done and not right"),
    (CrashMachine, lease_is_not_checked, LOST_LEASE),
    (CrashMachine, lines_need_no_lease, LOST_LEASE),
    (CrashMachine, the_living_are_not_waited_for, "two processes drive the store"),
    (CrashMachine, the_silent_are_never_followed, "is being driven by"),
    (CrashMachine, the_journal_is_not_read, "knows otherwise"),
    (CrashMachine, lines_are_glued_to_torn_ones, "done and not right|is not safe|units that changed|counts otherwise"),
    (CrashMachine, failed_cells_are_not_counted, "counts otherwise|knows otherwise"),
    (CrashMachine, failed_units_are_left, "a sweep that is not done"),
    (CrashMachine, partial_files_are_left, "partial files that are left"),
    (CrashMachine, checksums_are_not_minded, "damage that was not found"),
    (CrashMachine, digests_are_not_compared, "damage that was not found"),
    (CrashMachine, digests_differ, "false alarms"),
    (BucketMachine, lease_is_not_checked, LOST_LEASE),
    (BucketMachine, lines_wait_for_status, "status without receipt"),
]
"""Each must be found by what it breaks, not by anything else."""


@pytest.mark.parametrize(
    ("machine", "mistake", "found"),
    [
        pytest.param(*given, id=f"{'bucket' if given[0].bucket else 'folder'}: {given[1].__name__.replace('_', ' ')}")
        for given in MISTAKES
    ],
)
def test_a_planted_mistake_is_found(
    machine, mistake: Callable[[pytest.MonkeyPatch], None], found: str, monkeypatch: pytest.MonkeyPatch
):
    mistake(monkeypatch)
    with pytest.raises(AssertionError, match=found):
        run_state_machine_as_test(machine, settings=examples(200))
