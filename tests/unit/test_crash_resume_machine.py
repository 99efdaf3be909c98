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
    "units found bad",
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
        pytest.param(CrashMachine, 25, {"the last line is torn"}, id="folder"),
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


FOLDER_MISTAKES = [
    status_before_data,
    lease_is_not_checked,
    lines_need_no_lease,
    the_living_are_not_waited_for,
    the_silent_are_never_followed,
    the_journal_is_not_read,
    lines_are_glued_to_torn_ones,
    failed_cells_are_not_counted,
    failed_units_are_left,
    partial_files_are_left,
    checksums_are_not_minded,
    digests_are_not_compared,
    digests_differ,
]
BUCKET_MISTAKES = [lease_is_not_checked, lines_wait_for_status]


@pytest.mark.parametrize(
    ("machine", "mistake"),
    [
        *(pytest.param(CrashMachine, m, id=m.__name__.replace("_", " ")) for m in FOLDER_MISTAKES),
        *(pytest.param(BucketMachine, m, id=f"bucket, {m.__name__.replace('_', ' ')}") for m in BUCKET_MISTAKES),
    ],
)
def test_a_planted_mistake_is_found(machine, mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch):
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=examples(200))
