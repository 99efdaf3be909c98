"""The driver of a sweep between two events and at its end, with an executor that does as it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import UnitDone
from pipeline import ledger as ledger_module
from pipeline.plan import Plan
from pipeline.store import DONE, PENDING, Journal, Lease, LeaseLostError, StoreError, open_store, verify
from pipeline.store.lease import newest_claim
from pipeline.sweep import run_sweep
from tests.planted_units import small_plan

RECEIPT = SimpleNamespace(as_dict=lambda: {"cells": 2, "failed": 0, "bytes": 8, "seconds": 1.0, "digest": ""})


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small_plan()


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The time by which status is written; tests move it."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(ledger_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


class OneUnit:
    """Finishes the first unit, does what the test wants, and stops."""

    def __init__(self, then: Callable[[Callable[[], str | None]], None]) -> None:
        self.then = then

    def run(self, units: Iterator[Any], on_event: Callable[..., None], stop: Callable[[], str | None]) -> bool:
        on_event(UnitDone(unit=next(units).id, replica=0, attempt=1, seconds=1.0, receipt=RECEIPT))
        self.then(stop)
        return False

    def close(self) -> None:
        """There is nothing to give up."""


def sweep(plan: Plan, store: Any, then: Callable[[Callable[[], str | None]], None]) -> Any:
    return run_sweep(plan, store, make_executor=lambda *given: OneUnit(then))


def test_what_is_done_is_told_while_nothing_is_answered(plan, clock, tmp_path):
    """After the last event of an hour nobody should have to wait for the next one."""
    store, seen = tmp_path / "run.zarr", []

    def wait(stop: Callable[[], str | None]) -> None:
        for seconds in (0.0, 1.0, 2.0):
            clock.now += seconds
            assert stop() is None
            seen.append(int(open_store(store).status("baseline")[0]))

    sweep(plan, store, wait)
    assert seen == [PENDING, PENDING, DONE]


def test_a_lost_lease_is_noticed_while_nothing_is_answered(plan, clock, tmp_path):
    store = tmp_path / "run.zarr"
    other = Lease(store, beats=False)

    def taken_over(stop: Callable[[], str | None]) -> None:
        assert other._claim(2)
        clock.now += 10
        stop()
        pytest.fail("the driver went on")

    with pytest.raises(LeaseLostError, match="was taken over by process"):
        sweep(plan, store, taken_over)
    other.check()


@pytest.mark.parametrize("command", ["run", "verify"])
def test_the_lease_is_given_back_when_the_journal_cannot_be_closed(command, plan, tmp_path, monkeypatch):
    store = tmp_path / "run.zarr"
    sweep(plan, store, lambda stop: None)

    def fail(self: Journal) -> None:
        raise StoreError("the journal does not answer")

    monkeypatch.setattr(Journal, "close", fail)
    with pytest.raises(StoreError, match="the journal does not answer"):
        verify(store) if command == "verify" else sweep(plan, store, lambda stop: None)
    claim = newest_claim(store)
    assert claim is not None
    assert claim.released
