"""Several observers of one sweep: all hear everything, and one that raises harms nobody."""

from __future__ import annotations

import logging

import pytest

from cluster.events import ReplicaStarted, UnitFailed
from pipeline.observers import fan_out
from pipeline.plan import Unit

UNIT = Unit(id=5, group="map", index=0, sample=0)
EVENTS = [(ReplicaStarted(replica=n), None) for n in range(3)] + [(UnitFailed(unit=5, attempts=1, error="x"), UNIT)]


class Observer:
    """Keeps what it hears and raises at one of the events."""

    def __init__(self, raises_at=None, error=RuntimeError):
        self.heard, self.raises_at, self.error = [], raises_at, error

    def __call__(self, event, unit):
        self.heard.append((event, unit))
        if len(self.heard) == self.raises_at:
            raise self.error("observer is broken")


def test_everyone_hears_everything_in_order():
    observers = Observer(), Observer()
    observe = fan_out(*observers)
    for event in EVENTS:
        observe(*event)
    assert [o.heard for o in observers] == [EVENTS, EVENTS]


def test_nobody_is_fine():
    fan_out()(*EVENTS[0])


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])
def test_one_that_raises_is_left_out_and_the_others_go_on(caplog, place):
    observers = [Observer(), Observer()]
    broken = Observer(raises_at=2)
    observers.insert(place, broken)
    observe = fan_out(*observers)
    with caplog.at_level(logging.ERROR):
        for event in EVENTS:
            observe(*event)
    assert broken.heard == EVENTS[:2]
    assert [o.heard for o in observers if o is not broken] == [EVENTS, EVENTS]


def test_it_is_logged_once_with_the_reason(caplog):
    observe = fan_out(Observer(raises_at=1))
    with caplog.at_level(logging.ERROR):
        for event in EVENTS:
            observe(*event)
    (record,) = caplog.records
    assert "left out from here on" in record.getMessage()
    assert "observer is broken" in caplog.text


def test_two_may_break_at_once(caplog):
    healthy = Observer()
    observe = fan_out(Observer(raises_at=1), Observer(raises_at=1), healthy)
    for event in EVENTS:
        observe(*event)
    assert healthy.heard == EVENTS
    assert len(caplog.records) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit], ids=lambda e: e.__name__)
def test_interrupts_are_no_fault_of_the_observer(error):
    observe = fan_out(Observer(raises_at=1, error=error))
    with pytest.raises(error):
        observe(*EVENTS[0])
