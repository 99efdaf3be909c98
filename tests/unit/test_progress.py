"""Progress: what a user reads on a terminal and in a log file, whatever the events hold."""

from __future__ import annotations

import contextlib
import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster.events import (
    PoolDraining,
    PoolWaiting,
    ReplicaLost,
    ReplicaReleased,
    ReplicaStarted,
    UnitDone,
    UnitFailed,
    UnitRetried,
    UnitStarted,
)
from pipeline import progress as progress_module
from pipeline.plan import Unit
from pipeline.progress import PLAIN_SECONDS, WAITING_SECONDS, SweepProgress

UNIT = Unit(id=0, group="map", index=0, sample=0)


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module.time, "monotonic", clock.monotonic)
    return clock


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


def plain(log: io.StringIO, width: int = 80) -> SweepProgress:
    return SweepProgress(Console(file=log, force_terminal=False, width=width))


def done(cells: int = 10, failed: int = 0) -> UnitDone:
    receipt = SimpleNamespace(cells=cells, failed=failed)
    return UnitDone(unit=0, replica=0, attempt=1, seconds=0.1, receipt=receipt)


class TestPlainLines:
    def test_start_says_how_much_there_is(self, clock, log):
        with plain(log) as shown:
            shown.start(7, 7)
        assert log.getvalue() == "7 of 7 units to run\n"

    def test_start_of_the_rest_says_what_is_there(self, clock, log):
        with plain(log) as shown:
            shown.start(3, 10)
        assert log.getvalue() == "3 of 10 units to run, 7 already in the store\n"

    def test_last_unit_always_has_a_line(self, clock, log):
        with plain(log) as shown:
            shown.start(2, 2)
            shown.observe(done(), UNIT)
            clock.now += 4
            shown.observe(done(), UNIT)
        assert log.getvalue().splitlines()[1:] == ["2/2 units, 20 cells, 4 s, about 0 s left"]

    def test_lines_come_at_most_every_few_seconds(self, clock, log):
        with plain(log) as shown:
            shown.start(1000, 1000)
            for _ in range(100):
                clock.now += PLAIN_SECONDS / 10
                shown.observe(done(), UNIT)
        lines = log.getvalue().splitlines()[1:]
        assert 9 <= len(lines) <= 11

    def test_time_left_is_that_of_the_mean_unit(self, clock, log):
        with plain(log) as shown:
            shown.start(4, 4)
            clock.now += 30
            shown.observe(done(), UNIT)
        assert log.getvalue().splitlines()[-1] == "1/4 units, 10 cells, 30 s, about 90 s left"

    def test_time_left_weighs_units_by_their_cells(self, clock, log):
        with plain(log) as shown:
            shown.start(4, 4, 100)
            clock.now += 30
            shown.observe(done(), UNIT)
        assert log.getvalue().splitlines()[-1] == "1/4 units, 10 cells, 30 s, about 270 s left"

    def test_time_left_is_unknown_before_the_first_unit(self, clock, log):
        with plain(log) as shown:
            shown.start(4, 4)
            clock.now += 30
            shown.observe(ReplicaStarted(replica=0), None)
        assert log.getvalue().splitlines()[-1] == "0/4 units, 0 cells, 30 s, about ? s left"

    @pytest.mark.parametrize(
        ("event", "line"),
        [
            pytest.param(
                UnitFailed(unit=5, attempts=3, error="boom"), "unit 5 failed after 3 attempts: boom", id="failed"
            ),
            pytest.param(
                UnitRetried(unit=5, replica=0, attempt=1, error="boom"),
                "unit 5 will be tried again: boom",
                id="retried",
            ),
            pytest.param(ReplicaLost(replica=2, error="killed"), "replica 2 was lost: killed", id="replica-lost"),
            pytest.param(
                ReplicaLost(replica=2, error="killed", again_in_s=8.0),
                "replica 2 was lost: killed; it starts again in 8 s",
                id="replica-lost-for-a-while",
            ),
            pytest.param(
                ReplicaReleased(replica=2, reason="its node is about to go"),
                "replica 2 was released: its node is about to go",
                id="replica-released",
            ),
            pytest.param(
                UnitStarted(unit=5, replica=3, attempt=1, copy=True),
                "unit 5 takes long: replica 3 runs a copy of it",
                id="copy",
            ),
            pytest.param(
                PoolWaiting(seconds=30.0, reason="the cluster is full"),
                "waiting for a replica since 30 s: the cluster is full",
                id="waiting",
            ),
            pytest.param(
                PoolDraining(units=4, limit_s=120.0), "draining: 4 running units have 120 s to finish", id="draining"
            ),
        ],
    )
    def test_trouble_is_told_at_once(self, clock, log, event, line):
        with plain(log) as shown:
            shown.start(9, 9)
            shown.observe(event, UNIT)
        assert log.getvalue().splitlines()[1:] == [line]

    def test_waiting_is_told_again_after_a_while_or_for_another_reason(self, clock, log):
        with plain(log) as shown:
            shown.start(9, 9)
            # Lines on the state come with every event, once there has been none for some seconds.
            shown._last_line = float("inf")
            for seconds in range(0, 130, 10):
                shown.observe(PoolWaiting(seconds=seconds, reason="full"), None)
                clock.now += 10
            shown.observe(PoolWaiting(seconds=130, reason="no node"), None)
        lines = [line for line in log.getvalue().splitlines() if line.startswith("waiting")]
        assert WAITING_SECONDS == 60
        assert lines == [
            *(f"waiting for a replica since {seconds} s: full" for seconds in (0, 60, 120)),
            "waiting for a replica since 130 s: no node",
        ]

    @pytest.mark.parametrize(
        "event", [UnitStarted(unit=0, replica=0, attempt=1), ReplicaStarted(replica=0)], ids=["unit", "replica"]
    )
    def test_ordinary_events_are_silent(self, clock, log, event):
        with plain(log) as shown:
            shown.start(9, 9)
            shown.observe(event, UNIT)
        assert len(log.getvalue().splitlines()) == 1

    @pytest.mark.parametrize(
        "error",
        [
            pytest.param("unexpected key [/blocks.0] in [state]", id="closing-tag"),
            pytest.param("index [0] of shape [3, 4]", id="index"),
            pytest.param("[bold red]not markup[/bold red]", id="style"),
            pytest.param("a [link=http://x]link[/link] :smile:", id="link-and-emoji"),
        ],
    )
    def test_brackets_of_an_error_are_shown_as_they_are(self, clock, log, error):
        with plain(log) as shown:
            shown.start(9, 9)
            shown.observe(UnitFailed(unit=1, attempts=1, error=error), UNIT)
        assert error.replace(":smile:", "") in log.getvalue().replace(":smile:", "")

    def test_long_error_is_one_line(self, clock, log):
        with plain(log, width=40) as shown:
            shown.start(9, 9)
            shown.observe(UnitFailed(unit=1, attempts=1, error="x" * 300), UNIT)
        assert len(log.getvalue().splitlines()) == 2

    def test_there_are_no_control_characters(self, clock, log):
        with plain(log) as shown:
            shown.start(1, 1)
            shown.observe(done(), UNIT)
        assert "\x1b" not in log.getvalue()


class TestCounts:
    def test_cells_and_failed_cells_add_up(self, clock, log):
        with plain(log) as shown:
            shown.start(3, 3)
            shown.observe(done(cells=10, failed=2), UNIT)
            shown.observe(done(cells=5, failed=1), UNIT)
        assert (shown.done, shown.cells, shown.failed_cells) == (2, 15, 3)

    def test_failed_unit_is_done_and_has_no_cells(self, clock, log):
        with plain(log) as shown:
            shown.start(3, 3)
            shown.observe(UnitFailed(unit=0, attempts=3, error="boom"), UNIT)
        assert (shown.done, shown.cells) == (1, 0)

    def test_retried_unit_is_not_done(self, clock, log):
        with plain(log) as shown:
            shown.start(3, 3)
            shown.observe(UnitRetried(unit=0, replica=0, attempt=1, error="boom"), UNIT)
        assert shown.done == 0


class TestTerminal:
    def live(self, log: io.StringIO) -> Any:
        return SweepProgress(Console(file=log, force_terminal=True, width=100))

    def test_bar_counts_units_and_cells(self, log):
        with self.live(log) as shown:
            shown.start(2, 2)
            shown.observe(done(), UNIT)
            shown.observe(done(), UNIT)
        assert "2/2" in log.getvalue()
        assert "units, 20 cells" in log.getvalue()

    def test_trouble_is_told_above_the_bar(self, log):
        with self.live(log) as shown:
            shown.start(2, 2)
            shown.observe(UnitFailed(unit=1, attempts=3, error="bad [/tag]"), UNIT)
        assert "unit 1 failed after 3 attempts: bad [/tag]" in log.getvalue()

    def test_bar_is_taken_down_when_the_sweep_raises(self, log):
        shown = self.live(log)
        with contextlib.suppress(RuntimeError), shown:
            shown.start(2, 2)
            raise RuntimeError("boom")
        assert not shown._progress.live.is_started


def test_default_goes_to_standard_error(capsys):
    with SweepProgress() as shown:
        shown.start(1, 1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1 of 1 units to run" in captured.err
