"""What the driver knows of its units: recovered from status and journal in order, counted, written back with care."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import ledger as ledger_module
from pipeline.config import SweepConfig
from pipeline.layout import BASELINE
from pipeline.ledger import Ledger
from pipeline.plan import Plan, make_plan
from pipeline.store import DONE, FAILED, PENDING, Journal, Lease, LeaseLostError, Store, open_or_create

STEPS = 5


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(
        SweepConfig.model_validate(
            {
                "name": "ledger",
                "model": {"id": "embedded:maze"},
                "task": {"name": "maze", "mazes": 3},
                "sampler": {"steps": STEPS},
                "metrics": ["latent_distance"],
                "experiments": {
                    "map": {"kind": "patch", "step": "all", "layer": [0, 1]},
                    "noise": {"kind": "noise", "at": "step", "step": "all"},
                },
                "previews": {"samples": []},
                "unit_cells": 4,
            }
        )
    )


class Driver:
    """A store with its lease, journal and ledger."""

    def __init__(self, plan: Plan, path: Any) -> None:
        self.plan = plan
        self.store: Store = open_or_create(path, plan)
        self.lease = Lease(path, beats=False)
        self.lease.acquire()
        self.journal = Journal(path, self.lease.generation)
        self.ledger = self.read()

    def read(self) -> Ledger:
        return Ledger(self.store, self.plan, self.journal, self.lease)


@pytest.fixture
def driver(plan, tmp_path) -> Driver:
    return Driver(plan, tmp_path / "run.zarr")


def numbers(ledger: Ledger, plan: Plan) -> list[int]:
    return [unit.id for unit in ledger.pending(range(len(plan.layout)))]


def naive_todo(ledger: Ledger, plan: Plan) -> tuple[int, int]:
    units = list(ledger.pending(range(len(plan.layout))))
    return len(units), sum(plan.unit_cells(unit) for unit in units)


def test_a_new_store_has_everything_to_do(driver, plan):
    assert numbers(driver.ledger, plan) == list(range(len(plan.layout)))
    assert driver.ledger.todo() == naive_todo(driver.ledger, plan)
    assert len(driver.ledger) == len(plan.layout) == driver.ledger.count(PENDING)


def test_done_units_are_not_pending_and_failed_ones_are(driver, plan):
    first, second, third = (plan.layout.unit(n) for n in (0, 1, 2))
    driver.ledger.done(first, 0)
    driver.ledger.done(second, 2)
    driver.ledger.failed(third)
    assert numbers(driver.ledger, plan) == list(range(1, len(plan.layout)))
    assert (driver.ledger.count(DONE), driver.ledger.count(FAILED)) == (1, 2)
    assert driver.ledger.failed_cells == 2 + plan.unit_cells(third)


def test_a_failed_unit_that_succeeds_later_counts_no_failed_cells(driver, plan):
    unit = plan.layout.unit(1)
    driver.ledger.failed(unit)
    driver.ledger.done(unit, 0)
    assert driver.ledger.failed_cells == 0
    assert driver.ledger.count(FAILED) == 0


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_counts_equal_those_of_going_through_all_units(data, plan, tmp_path_factory):
    ledger = Driver(plan, tmp_path_factory.mktemp("store") / "run.zarr").ledger
    for number in data.draw(st.lists(st.integers(0, len(plan.layout) - 1))):
        ledger.done(plan.layout.unit(number), data.draw(st.sampled_from([0, 0, 1])))
    assert ledger.todo() == naive_todo(ledger, plan)


class TestRecovery:
    @pytest.mark.parametrize(
        ("lines", "status", "failed"),
        [
            pytest.param([{"failed": 0}], DONE, 0, id="done"),
            pytest.param([{"failed": 3}], FAILED, 3, id="cells failed"),
            pytest.param([{"error": "ValueError: x", "failed": 4}], FAILED, 4, id="raised"),
            pytest.param([{"error": "ValueError: x", "failed": 4}, {"failed": 0}], DONE, 0, id="then done"),
            pytest.param([{"failed": 0}, {"unset": "checksum"}], PENDING, 0, id="found bad"),
            pytest.param([{"failed": 0}, {"unset": "checksum"}, {"failed": 0}], DONE, 0, id="computed again"),
        ],
    )
    def test_the_last_line_of_a_unit_counts(self, lines, status, failed, driver):
        for line in lines:
            driver.journal.append(group="map", index=2, **line)
        ledger = driver.read()
        assert ledger._status["map"][2] == status
        assert ledger.failed_cells == failed

    @pytest.mark.parametrize(
        "line",
        [
            pytest.param({"group": "gone", "index": 0}, id="another sweep's group"),
            pytest.param({"group": "map", "index": 10**6}, id="beyond the last unit"),
            pytest.param({"group": "map", "index": -1}, id="before the first unit"),
            pytest.param({"group": "map", "index": "0"}, id="no number"),
            pytest.param({"unit": 3, "replica": 0, "retried": "died"}, id="a retry"),
            pytest.param({}, id="nothing"),
        ],
    )
    def test_a_line_about_no_unit_of_the_sweep_changes_nothing(self, line, driver, plan):
        driver.journal.append(**line)
        assert driver.read().count(PENDING) == len(plan.layout)

    def test_status_without_a_journal_is_believed(self, driver, plan):
        driver.ledger.done(plan.layout.unit(0), 0)
        driver.ledger.flush(force=True)
        assert numbers(driver.read(), plan)[0] == 1

    def test_the_journal_is_newer_than_status(self, driver):
        """Status is written every few seconds, the journal at once."""
        driver.journal.append(group=BASELINE, index=1, failed=0)
        assert list(driver.store.status(BASELINE)) == [PENDING] * 3
        ledger = driver.read()
        ledger.flush(force=True)
        assert list(driver.store.status(BASELINE)) == [PENDING, DONE, PENDING]


class TestFlush:
    def test_status_waits_for_its_time(self, driver, plan, monkeypatch):
        now = [1000.0]
        monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now[0])
        ledger = driver.read()
        ledger.done(plan.layout.unit(0), 0)
        ledger.flush()
        assert driver.store.status(BASELINE)[0] == PENDING
        now[0] += ledger_module.FLUSH_SECONDS
        ledger.flush()
        assert driver.store.status(BASELINE)[0] == DONE

    def test_only_what_changed_is_written(self, driver, plan, monkeypatch):
        written = []
        monkeypatch.setattr(driver.store, "write_status", lambda group, values: written.append(group))
        driver.ledger.done(plan.layout.unit(0), 0)
        driver.ledger.flush(force=True)
        driver.ledger.flush(force=True)
        assert written == [BASELINE]

    def test_a_driver_that_was_taken_over_from_writes_nothing(self, driver, plan):
        driver.ledger.done(plan.layout.unit(0), 0)
        other = Lease(driver.store.location, beats=False, lives=lambda holder: False)
        other.acquire()
        with pytest.raises(LeaseLostError, match="was taken over by process"):
            driver.ledger.flush(force=True)
        assert driver.store.status(BASELINE)[0] == PENDING

    def test_a_driver_needs_few_bytes_a_unit(self, driver, plan):
        ledger = driver.ledger
        arrays = [*ledger._status.values(), *ledger._failed.values()]
        assert sum(array.nbytes for array in arrays) == 5 * len(plan.layout)
        assert {array.dtype for array in arrays} == {np.dtype("uint8"), np.dtype("int32")}
